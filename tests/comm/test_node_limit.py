import pytest
import torch

from comm.node_limit import limit_groups


def _brute_force(scores: list[float], num_groups: int, num_limited_groups: int, num_per_group: int) -> list[bool]:
    size = len(scores) // num_groups
    sums = []
    for group in range(num_groups):
        best = sorted(scores[group * size : (group + 1) * size], reverse=True)[:num_per_group]
        sums.append(sum(best))
    kept = sorted(range(num_groups), key=lambda group: -sums[group])[:num_limited_groups]
    return [expert // size in kept for expert in range(len(scores))]


@pytest.mark.parametrize("shift", [0.0, -0.7, -5.0])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "num_limited_groups", "num_per_group"),
    [(256, 8, 4, 2), (16, 4, 2, 2), (12, 3, 1, 4), (8, 8, 3, 1), (6, 1, 1, 3), (12, 4, 4, 1)],
)
def test_limit_groups_equals_brute_force(
    num_experts: int, num_groups: int, num_limited_groups: int, num_per_group: int, shift: float
) -> None:
    biased_TE = torch.rand(40, num_experts, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + shift
    mask_TE = limit_groups(biased_TE, num_groups, num_limited_groups, num_per_group)
    expected = [_brute_force(row, num_groups, num_limited_groups, num_per_group) for row in biased_TE.tolist()]
    assert mask_TE.dtype == torch.bool
    assert mask_TE.tolist() == expected


def test_limit_groups_caps_groups_of_masked_choice_with_negative_scores() -> None:
    biased_TE = torch.rand(500, 64, generator=torch.Generator().manual_seed(2)) - 2.0
    masked_TE = biased_TE.masked_fill(~limit_groups(biased_TE, 8, 4, 2), -torch.inf)
    groups_TK = masked_TE.topk(8, -1).indices // 8
    assert max(len(set(groups)) for groups in groups_TK.tolist()) <= 4


def test_limit_groups_keeps_leading_dims() -> None:
    biased_BTE = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(3))
    mask_BTE = limit_groups(biased_BTE, 4, 2, 2)
    assert torch.equal(mask_BTE.flatten(0, 1), limit_groups(biased_BTE.flatten(0, 1), 4, 2, 2))


@pytest.mark.parametrize(
    ("counts", "name"), [((3, 1, 1), "num_groups"), ((4, 5, 1), "num_limited_groups"), ((4, 2, 5), "num_per_group")]
)
def test_limit_groups_rejects_counts_that_do_not_fit(counts: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must .* is"):
        limit_groups(torch.zeros(1, 16), *counts)

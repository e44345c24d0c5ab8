"""Every implementation of causal attention, with and without documents, against a reading query by query."""

import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention import ATTENTION, choose_attention, makes_dense_masks, pads_values
from kernels.attention.documents import Documents
from kernels.registry import UnknownNameError
from tests.kernels.flash_attn_emulation import Calls, emulated
from tests.kernels.plain import near, randn

ROOT = Path(__file__).resolve().parents[2]
SCALE = 0.37
PLACES = {
    "documents and padding": [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, -1, -1], [7, 8, 9, 10, 0, 1, 2, 3, 4, 5, 6, 7, 8]],
    "one document": [list(range(13)), list(range(20, 33))],
    "single tokens": [[0] * 13, [-1] * 13],
    "one token": [[0], [4]],
}


def flatly(x: Tensor) -> Tensor:
    """Returns the same numbers in the memory layout of the model: heads of a token side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def documents_of(places: list[list[int]]) -> list[list[int]]:
    """Returns a document number for each token, from a loop over each sequence."""
    numbered = []
    for sequence in places:
        numbers = [0]
        for before, place in pairwise(sequence):
            numbers.append(numbers[-1] + (place <= 0 or place != before + 1))
        numbered.append(numbers)
    return numbered


def by_query(query: Tensor, key: Tensor, value: Tensor, numbers: list[list[int]] | None) -> Tensor:
    """Computes attention by a softmax over the visible keys of one query after the other."""
    batch, _, size, _ = query.shape
    rows: list[Tensor] = []
    for b in range(batch):
        for t in range(size):
            seen = [s for s in range(t + 1) if numbers is None or numbers[b][s] == numbers[b][t]]
            scores_HS = (key[b][:, seen] @ query[b, :, t, :, None])[..., 0] * SCALE
            rows.append((scores_HS.softmax(-1)[:, None] @ value[b][:, seen])[:, 0])
    return torch.stack(rows).unflatten(0, (batch, size)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("places", [None, *PLACES])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", ATTENTION.names())
def test_attention_equals_reading_query_by_query(
    name: str, is_padded: bool, places: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention here is an emulation of the package; kernels that are not for CPU may lack a backward there."""
    kernel, calls = ATTENTION.get(name), Calls()
    monkeypatch.setitem(sys.modules, "flash_attn", emulated(calls))
    if kernel.package not in (None, "flash_attn") and not kernel.is_installed:
        pytest.skip(f"needs the package {kernel.package}")
    if kernel.pads_values("cpu") and kernel.pads_values("cuda") and not is_padded:
        pytest.skip("always takes padded values")
    is_forward_only = "cpu" not in kernel.devices and kernel.package is None
    positions = None if places is None else PLACES[places]
    documents = None if positions is None else Documents.from_positions(torch.tensor(positions))
    size = 13 if positions is None else len(positions[0])
    shapes = [(2, 3, size, 12), (2, 3, size, 12), (2, 3, size, 7)]
    exact = [randn(*shape, seed=seed, dtype=dtype).double().requires_grad_() for seed, shape in enumerate(shapes)]
    grad = randn(2, 3, size, 7, seed=3)
    expected = by_query(exact[0], exact[1], exact[2], None if positions is None else documents_of(positions))
    expected.backward(grad)
    given = [flatly(each.detach().to(dtype)).requires_grad_(not is_forward_only) for each in exact]
    query, key, value = given
    if is_padded:
        value = functional.pad(value, (0, 5))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without")  # on CPU it runs as it is written
        made = kernel.attend(query, key, value, SCALE, documents)
    near(made[..., :7].detach(), expected.detach(), 16, sums=8)
    assert (calls.num_whole, calls.num_packed) == (
        (0, 0) if name != "flash_attention" else (1, 0) if documents is None else (0, 1)
    )
    if not is_forward_only:
        made[..., :7].backward(grad.to(dtype))
        for ours, theirs in zip(given, exact, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            # A query that sees one key has no slope: a difference of two numbers of about this size.
            near(ours.grad, theirs.grad, 32, sums=32, largest=4.0)


def test_flex_serves_all_layers_with_one_mask() -> None:
    documents = Documents.from_positions(torch.tensor(PLACES["documents and padding"]))
    assert documents.block_mask is documents.block_mask
    assert documents.mask_B1TT is documents.mask_B1TT


def test_documents_begin_at_positions_that_do_not_continue() -> None:
    documents = Documents.from_positions(torch.tensor(PLACES["documents and padding"]))
    assert documents.ids_BT.tolist() == [[1, 1, 1, 2, 2, 3, 4, 4, 4, 4, 4, 5, 6], [1, 1, 1, 1] + [2] * 9]
    assert documents.starts.tolist() == [0, 3, 5, 6, 11, 12, 13, 17, 26]
    assert documents.starts.dtype == torch.int32
    assert documents.longest == 9
    mask_TT = documents.mask_B1TT[0, 0]
    assert documents.mask_B1TT.shape == (2, 1, 13, 13)
    assert [row.nonzero().flatten().tolist() for row in mask_TT[[0, 2, 4, 5, 8, 12]]] == [
        [0],
        [0, 1, 2],
        [3, 4],
        [5],
        [6, 7, 8],
        [12],
    ]


def test_runs_of_documents_cover_all_tokens_in_order() -> None:
    documents = Documents.from_positions(torch.tensor(PLACES["documents and padding"]))
    runs = [(run.start, run.length, run.num_documents) for run in documents.runs]
    assert runs == [(0, 3, 1), (3, 2, 1), (5, 1, 1), (6, 5, 1), (11, 1, 2), (13, 4, 1), (17, 9, 1)]
    assert [each.length for each in Documents.from_positions(torch.arange(5).repeat(2, 3)).runs] == [5]


@pytest.mark.parametrize("name", ["documents and padding", "one document"])
def test_attention_on_a_cpu_saves_nothing_for_pairs_of_tokens(name: str) -> None:
    documents = Documents.from_positions(torch.tensor(PLACES[name]))
    heads = [flatly(randn(2, 3, 13, 12, seed=seed)).requires_grad_() for seed in range(3)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        ATTENTION.get("sdpa").attend(*heads, SCALE, documents)
    assert sum(each.numel() for each in saved) == 4 * heads[0].numel() + heads[0][..., 0].numel()
    assert "mask_B1TT" not in vars(documents)


def test_documents_move_as_a_whole() -> None:
    documents = Documents.from_positions(torch.tensor(PLACES["one document"]))
    moved = documents.to(torch.device("meta"))
    assert {moved.ids_BT.device.type, moved.starts.device.type} == {"meta"}
    assert moved.longest == documents.longest == 13


@pytest.mark.parametrize(
    ("device", "dtype", "is_packed", "is_installed", "expected"),
    [
        ("cpu", torch.bfloat16, True, True, "sdpa"),
        ("cuda", torch.bfloat16, False, True, "flash_attention"),
        ("cuda", torch.float16, True, True, "flash_attention"),
        ("cuda", torch.float32, True, True, "flex"),
        ("cuda", torch.float32, False, True, "sdpa"),
        ("cuda", torch.bfloat16, True, False, "flex"),
        ("cuda", torch.bfloat16, False, False, "sdpa"),
    ],
)
def test_auto_takes_what_is_installed_and_serves(
    device: str,
    dtype: torch.dtype,
    is_packed: bool,
    is_installed: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kernels.attention.find_spec", lambda name: object() if is_installed else None)
    assert choose_attention("auto", torch.device(device), dtype, is_packed=is_packed) is ATTENTION.get(expected)
    for name in ATTENTION.names():
        assert choose_attention(name, torch.device(device), dtype, is_packed=is_packed) is ATTENTION.get(name)


def test_values_are_padded_for_kernels_that_want_it() -> None:
    assert pads_values("sdpa", "cpu")
    assert not pads_values("sdpa", "cuda")
    assert pads_values("flash_attention", "cuda")
    assert not pads_values("flex", "cuda")
    assert pads_values("auto", "cpu")
    assert not pads_values("auto", "cuda")


def test_masks_are_dense_if_the_kernel_reads_dense_masks() -> None:
    expected = {
        "sdpa": [False, True],
        "flex": [False, False],
        "flash_attention": [False, False],
        "auto": [False, False],
    }
    for name, dense in expected.items():
        assert [makes_dense_masks(name, device) for device in ("cpu", "cuda")] == dense, name


def test_unknown_kernel_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"^attention: must be one of .*'flash'; did you mean flash_attention"):
        choose_attention("flash", torch.device("cpu"), torch.float32, is_packed=False)


def test_kernel_of_the_documentation_passes_the_contract_from_outside(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extend.md").read_text("utf-8").partition("## An attention kernel")[2]
    (tmp_path / "plain.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--plugins", str(tmp_path / "plain.py")]
    command += ["-k", "query_by_query and plain", "tests/kernels/test_attention.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "20 passed" in done.stdout

"""Every implementation of causal attention against a reading query by query, and attention by blocks."""

import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from base.registry import UnknownNameError
from kernels.attention import (
    ATTENTION,
    AttentionKernel,
    BlockKernelError,
    NoKernelError,
    block_kernels,
    choose_attention,
    choose_block_kernel,
    has_module,
    implementations,
    makes_dense_masks,
    pads_values,
)
from kernels.attention.block_kernels import REFERENCE, BlockKernel
from kernels.attention.blocks import MergedAttention, MergedBackward, SegmentCut, VisibleTile, visible_tiles
from kernels.attention.documents import Documents
from tests import ROOT
from tests.commands import run_command
from tests.kernels.flash_attn_emulation import PACKAGES, Calls
from tests.kernels.plain import near, randn

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


AS_THEY_ARE = [
    (name, False)
    for name, kernel in ATTENTION.items()
    if not (kernel.pads_values("cpu") and kernel.pads_values("cuda"))
]
"""Kernels that take values without padding."""


@pytest.mark.slow
@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("places", [None, *PLACES])
@pytest.mark.parametrize(("name", "is_padded"), [*((name, True) for name in ATTENTION.names()), *AS_THEY_ARE])
def test_attention_equals_reading_query_by_query(
    name: str, is_padded: bool, places: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention here is an emulation of the package; kernels that are not for CPU may lack a backward there."""
    kernel, calls = ATTENTION.get(name), Calls()
    if kernel.package in PACKAGES:
        monkeypatch.setitem(sys.modules, kernel.package, PACKAGES[kernel.package](calls))
    elif not kernel.is_installed:
        pytest.skip(f"needs the package {kernel.package}")
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
        (0, 0) if kernel.package not in PACKAGES else (1, 0) if documents is None else (0, 1)
    )
    assert calls.num_deterministic == calls.num_whole + calls.num_packed
    if not is_forward_only:
        made[..., :7].backward(grad.to(dtype))
        for ours, theirs in zip(given, exact, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            # A query that sees one key has no slope: a difference of two numbers of about this size.
            near(ours.grad, theirs.grad, 32, sums=32, largest=4.0)


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
        ATTENTION.get("sdpa").attend(*heads, SCALE, documents)  # type: ignore[arg-type, call-arg]
    assert sum(each.numel() for each in saved) == 4 * heads[0].numel() + heads[0][..., 0].numel()
    assert "mask_B1TT" not in vars(documents)


FA2, FA3, FA4 = "flash_attn_2_cuda", "flash_attn_interface", "flash_attn.cute"


@pytest.mark.parametrize(
    ("place", "is_packed", "installed", "expected"),
    [
        (("cpu", torch.bfloat16, 0), True, (FA2, FA3, FA4), "sdpa"),
        # A Hopper GPU: 3, 4, cuDNN by torch, and 2 only for documents.
        (("cuda", torch.bfloat16, 9), False, (FA2, FA3, FA4), "flash_attention_3"),
        (("cuda", torch.float16, 9), True, (FA2, FA3, FA4), "flash_attention_3"),
        (("cuda", torch.bfloat16, 9), False, (FA2, FA4), "flash_attention_4"),
        (("cuda", torch.bfloat16, 9), False, (FA2,), "sdpa"),
        (("cuda", torch.bfloat16, 9), True, (FA2,), "flash_attention"),
        (("cuda", torch.bfloat16, 8), False, (FA2, FA3, FA4), "flash_attention"),
        (("cuda", torch.bfloat16, 10), False, (FA2, FA3, FA4), "flash_attention_4"),
        (("cuda", torch.float32, 9), True, (FA2, FA3, FA4), "flex"),
        (("cuda", torch.float32, 9), False, (FA2, FA3, FA4), "sdpa"),
        (("cuda", torch.bfloat16, 9), True, (), "flex"),
        (("cuda", torch.bfloat16, 9), False, (), "sdpa"),
    ],
)
def test_auto_takes_the_best_that_is_installed(
    place: tuple[str, torch.dtype, int],
    is_packed: bool,
    installed: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, dtype, capability = place
    monkeypatch.setattr("kernels.attention.has_module", lambda name: name in installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(implementations, "_has_deterministic_hopper_backward", lambda: True)
    assert choose_attention("auto", torch.device(device), dtype, is_packed=is_packed) is ATTENTION.get(expected)
    for name in ATTENTION.names():
        assert choose_attention(name, torch.device(device), dtype, is_packed=is_packed) is ATTENTION.get(name)
    try:
        chosen = choose_attention("deterministic", torch.device(device), dtype, is_packed=is_packed)
    except NoKernelError:
        assert (device, not installed or dtype == torch.float32) == ("cuda", True)
    else:
        flash = {"flash_attention", "flash_attention_3", "flash_attention_4"}
        names = {"sdpa"} if device == "cpu" else ({expected} & flash or {"flash_attention"})
        assert chosen in map(ATTENTION.get, names)


def test_packages_of_one_import_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 alone makes `flash_attn` importable, without the functions of version 2."""
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (has_module, implementations._has_deterministic_hopper_backward):
        cached.cache_clear()
    assert ATTENTION.get("flash_attention_4").is_installed
    assert not ATTENTION.get("flash_attention").is_installed
    assert not implementations._has_deterministic_hopper_backward()
    (cute / "flash_bwd_sm90.py").write_text("def __init__(self, deterministic: bool = False): ...")
    implementations._has_deterministic_hopper_backward.cache_clear()
    assert implementations._has_deterministic_hopper_backward()
    for cached in (has_module, implementations._has_deterministic_hopper_backward):
        cached.cache_clear()


def test_version_without_a_deterministic_backward_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def older(q: Tensor, softmax_scale: float, causal: bool) -> None: ...

    def newer(q: Tensor, softmax_scale: float, causal: bool, deterministic: bool = False) -> None: ...

    with pytest.raises(NoKernelError, match=r"^attention: flash_attn must have a deterministic .* attention=sdpa$"):
        implementations._offered("flash_attn", older)
    with caplog.at_level("INFO", "kernels"):
        for function in (newer, newer):
            attend, _ = implementations._offered("flash_attn", function)
            attend(torch.zeros(1), softmax_scale=1.0, causal=True)
    assert [record.message for record in caplog.records] == ["attention: flash_attn with a deterministic backward"]


def test_torchs_kernel_on_cuda_is_pinned_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The order that torch gets, seen from within the call; the operands' device is the only fake."""
    orders: list[list[int]] = []
    empty = torch.empty

    class OnCuda(Tensor):
        device = torch.device("cuda")

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        orders.append(torch._C._get_sdp_priority_order()[:4])
        return value

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    implementations._log_sdpa.cache_clear()
    heads = [randn(1, 2, 4, size, seed=0, dtype=torch.bfloat16).as_subclass(OnCuda) for size in (192, 192, 128)]
    before = torch._C._get_sdp_priority_order()
    with caplog.at_level("INFO", "kernels"):
        for _ in range(2):
            implementations.scaled_dot_product(*heads, SCALE, None)  # type: ignore[arg-type, call-arg]
    assert torch._C._get_sdp_priority_order() == before
    expected = [int(getattr(SDPBackend, name)) for name in implementations._SDPA_ORDER]
    assert orders == [expected, expected]
    assert implementations._SDPA_ORDER[0] == "CUDNN_ATTENTION"
    (record,) = caplog.records
    assert "sdpa, kernel" in record.message
    assert "192 and 128" in record.message


def test_values_are_padded_for_kernels_that_want_it() -> None:
    assert pads_values("sdpa", "cpu")
    assert not pads_values("sdpa", "cuda")
    assert pads_values("flash_attention", "cuda")
    assert not pads_values("flash_attention_3", "cuda")
    assert not pads_values("flash_attention_4", "cuda")
    assert not pads_values("flex", "cuda")
    assert pads_values("auto", "cpu")
    assert not pads_values("auto", "cuda")


def test_masks_are_dense_if_the_kernel_reads_dense_masks() -> None:
    expected = {
        "sdpa": [False, True],
        "flex": [False, False],
        "flash_attention": [False, False],
        "flash_attention_3": [False, False],
        "auto": [False, False],
    }
    for name, dense in expected.items():
        assert [makes_dense_masks(name, device) for device in ("cpu", "cuda")] == dense, name


def test_unknown_kernel_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"^attention: must be one of .*'flash'; did you mean flash_attention"):
        choose_attention("flash", torch.device("cpu"), torch.float32, is_packed=False)


@pytest.mark.long
def test_kernel_of_the_documentation_passes_the_contract_from_outside(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extend.md").read_text("utf-8").partition("## An attention kernel")[2]
    (tmp_path / "plain.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    command = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--plugins", str(tmp_path / "plain.py")]
    done = run_command([*command, "-k", "query_by_query and plain", "tests/kernels/test_attention.py"], timeout=300)
    assert done.returncode == 0, done.stdout
    assert "20 passed" in done.stdout


CPU = torch.device("cpu")
KERNELS = {"fused": block_kernels.CPU_FLASH, "reference": REFERENCE}
SIZES = (1, 2, 4)
SEGMENT = 3


def places(size: int, seed: int) -> list[list[int]]:
    """Returns two sequences of documents of random lengths, the second with padding at its end."""
    generator, tokens = torch.Generator().manual_seed(seed), 2 * size * SEGMENT
    found = []
    for sequence in range(2):
        row: list[int] = []
        while len(row) < tokens:
            row += range(int(torch.randint(1, 3 * SEGMENT, (), generator=generator)))
        found.append(row[:tokens] if sequence == 0 else [*row[: tokens - 2], -1, -1])
    return found


def zigzag(index: int, size: int) -> list[int]:
    return [index, 2 * size - 1 - index]


def held(x_BHTQ: Tensor, segments: Sequence[int]) -> Tensor:
    """Returns the rows of some segments as the model stores them, BTHQ."""
    parts = x_BHTQ.transpose(1, 2).split(SEGMENT, 1)
    return torch.cat([parts[segment] for segment in segments], 1).contiguous()


def cut_of(size: int, documents: Documents | None) -> SegmentCut:
    starts = None if documents is None else tuple(documents.starts.tolist())
    return SegmentCut(num_sequences=2, edges=tuple(range(0, (2 * size + 1) * SEGMENT, SEGMENT)), starts=starts)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_tiles_cover_every_visible_pair_once(size: int, is_packed: bool) -> None:
    for seed in range(5 if is_packed else 1):
        positions = places(size, seed) if is_packed else [list(range(2 * size * SEGMENT))] * 2
        numbers = documents_of(positions)
        cut = cut_of(size, Documents.from_positions(torch.tensor(positions)) if is_packed else None)
        for index, other in product(range(size), repeat=2):
            queries, keys = zigzag(index, size), zigzag(other, size)
            expected = {
                (b, q, k)
                for b, q, k in product(range(2), tokens_of(queries), tokens_of(keys))
                if k <= q and numbers[b][k] == numbers[b][q]
            }
            tiles = visible_tiles(cut, queries, keys)
            seen = [pair for tile in tiles for pair in pairs_of(tile, queries, keys)]
            assert len(seen) == len(set(seen)) == sum(num_scores(tile) for tile in tiles)
            assert set(seen) == expected, f"rank {index} of {size}, keys of rank {other}, seed {seed}"


def tokens_of(segments: Sequence[int]) -> list[int]:
    return [segment * SEGMENT + place for segment in segments for place in range(SEGMENT)]


def num_scores(tile: VisibleTile) -> int:
    """Returns the number of pairs of a query and a key that it sees."""
    queries, keys = (end - start for start, end in (tile.queries, tile.keys))
    length = queries // tile.num_documents
    pairs = tile.num_documents * length * (length + 1) // 2 if tile.is_causal else queries * keys
    return (tile.sequences[1] - tile.sequences[0]) * pairs


def pairs_of(tile: VisibleTile, queries: Sequence[int], keys: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns the pairs of a query and a key of a tile, by sequence and place in it."""
    length = (tile.queries[1] - tile.queries[0]) // tile.num_documents
    found = []
    for b, q, k in product(range(*tile.sequences), range(*tile.queries), range(*tile.keys)):
        row, column = q - tile.queries[0], k - tile.keys[0]
        is_same = tile.num_documents == 1 or row // length == column // length
        if is_same and (not tile.is_causal or column <= row):
            found.append((b, tokens_of(queries)[q], tokens_of(keys)[k]))
    return found


@pytest.mark.parametrize("size", [1, 2, 16])
def test_attention_work_is_equal_on_all_ranks(size: int) -> None:
    """Without documents, it is exactly equal; that of contiguous parts would not be."""
    cut = SegmentCut(num_sequences=1, edges=tuple(range(0, (2 * size + 1) * 512, 512)), starts=None)

    def work(queries: list[int], keys: list[list[int]]) -> int:
        return sum(num_scores(tile) for each in keys for tile in visible_tiles(cut, queries, each))

    held_by = [zigzag(index, size) for index in range(size)]
    works = [work(queries, held_by) for queries in held_by]
    assert max(works) - min(works) <= 0.01 * max(works)
    assert sum(works) == 1024 * size * (1024 * size + 1) // 2
    contiguous = [[2 * index, 2 * index + 1] for index in range(size)]
    assert size == 1 or work(contiguous[-1], contiguous) > 1.4 * max(works)


def attend_by_blocks(
    heads: Sequence[Tensor], grad: Tensor, kernel: BlockKernel, size: int, documents: Documents | None
) -> list[Tensor]:
    """Returns the result and the gradients of queries, keys and values, BHTV, from the blocks of all ranks."""
    cut, tokens = cut_of(size, documents), 2 * size * SEGMENT
    query, key, value = heads
    width = kernel.widths(key.shape[-1], value.shape[-1])[1]
    found = [torch.zeros_like(value), *(torch.zeros_like(each) for each in heads)]
    for index in range(size):
        own = zigzag(index, size)
        merged = MergedAttention(held(query, own), width)
        for other in ((index - distance) % size for distance in range(size)):
            keys = zigzag(other, size)
            parts = held(query, own), held(key, keys), held(value, keys)
            merged.add(visible_tiles(cut, own, keys), parts, kernel, SCALE)
        mixed, log_sums = merged.result(value.shape[-1])
        rows = [position for segment in own for position in range(tokens)[segment * SEGMENT : (segment + 1) * SEGMENT]]
        found[0][:, :, rows] = mixed.transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        backward = MergedBackward(
            query_BTHQ=held(query, own),
            mixed_BTHV=mixed,
            log_sums_BTH=log_sums,
            grad_mixed_BTHV=held(grad, own),
            grad_query_BTHQ=torch.zeros_like(held(query, own), dtype=wide),
            kernel=kernel,
            scale=SCALE,
        )
        for other in range(size):
            keys = zigzag(other, size)
            columns = tokens_of(keys)
            made = backward.add(visible_tiles(cut, own, keys), held(key, keys), held(value, keys))
            for total, part in zip(found[2:], made, strict=True):
                total[:, :, columns] += part.transpose(1, 2)
        found[1][:, :, rows] = backward.grad_query_BTHQ.to(query.dtype).transpose(1, 2)
    return found


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_of_all_ranks_equal_reading_query_by_query(
    name: str, size: int, is_packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reference splits its queries too.
    monkeypatch.setattr("kernels.attention.block_kernels._MOST_SCORES", 40)
    tokens = 2 * size * SEGMENT
    positions = places(size, 7) if is_packed else None
    documents = None if positions is None else Documents.from_positions(torch.tensor(positions))
    exact = [randn(2, 3, tokens, 12, seed=seed, dtype=dtype).double().requires_grad_() for seed in range(3)]
    grad = randn(2, 3, tokens, 12, seed=3)
    expected = by_query(*exact, None if positions is None else documents_of(positions))  # type: ignore[arg-type, call-arg]
    expected.backward(grad)
    heads = [flatly(each.detach().to(dtype)) for each in exact]
    made, *gradients = attend_by_blocks(heads, grad.to(dtype), KERNELS[name], size, documents)
    near(made, expected.detach(), 16, sums=8)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert theirs.grad is not None
        near(ours, theirs.grad, 32, sums=32, largest=4.0)


def test_blocks_in_bf16_are_as_near_as_one_call() -> None:
    """The merge is in float32, so blocks are rounded once more than one call: each block and the result."""
    tokens = 2 * 4 * SEGMENT
    heads = [flatly(randn(2, 3, tokens, 12, seed=seed, dtype=torch.bfloat16)) for seed in range(3)]
    grad = flatly(randn(2, 3, tokens, 12, seed=3, dtype=torch.bfloat16))
    exact = [each.double().requires_grad_() for each in heads]
    expected = by_query(*exact, None)  # type: ignore[arg-type, call-arg]
    expected.backward(grad.double())
    whole = [each.clone().requires_grad_() for each in heads]
    result = choose_attention("auto", CPU, torch.bfloat16, is_packed=False).attend(*whole, SCALE, None)  # type: ignore[arg-type, call-arg]
    result.backward(grad)
    made = attend_by_blocks(heads, grad, block_kernels.CPU_FLASH, 4, None)
    for ours, called, right in zip(
        made, [result.detach(), *(each.grad for each in whole)], [expected, *(each.grad for each in exact)], strict=True
    ):
        assert called is not None
        assert right is not None
        assert (ours.double() - right).norm() <= 2 * (called.double() - right).norm() + 1e-12


def test_block_kernels_are_chosen_by_device_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert choose_block_kernel("auto", CPU, torch.bfloat16) is block_kernels.CPU_FLASH
    assert choose_block_kernel("sdpa", cuda, torch.bfloat16) is block_kernels.CUDA_FLASH
    assert choose_block_kernel("auto", cuda, torch.float32) is block_kernels.CUDA_EFFICIENT
    assert choose_block_kernel("auto", cuda, torch.float64) is REFERENCE
    assert block_kernels.CPU_FLASH.widths(24, 20) == (24, 24)
    assert block_kernels.CUDA_FLASH.widths(20, 30) == (32, 32)
    assert REFERENCE.widths(24, 20) == (24, 20)
    message = r"^attention: must return sums of exponentials .*, is flex; nearest valid: auto, sdpa$"
    with pytest.raises(BlockKernelError, match=message):
        choose_block_kernel("flex", CPU, torch.float32)
    plain: AttentionKernel = ATTENTION.get("flash_attention")
    assert not plain.has_blocks


@pytest.mark.parametrize(
    ("kernel", "dtype"), [(block_kernels.CUDA_FLASH, torch.bfloat16), (block_kernels.CUDA_EFFICIENT, torch.float32)]
)
def test_block_kernels_of_cuda_accept_their_arguments(kernel: BlockKernel, dtype: torch.dtype) -> None:
    """On the meta device, which checks signatures and shapes but computes nothing; no GPU is claimed."""
    query = torch.empty(2, 40, 3, 24, dtype=dtype, device="meta").transpose(1, 2)
    key, value = (torch.empty(2, 64, 3, 24, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
    mixed, log_sums = kernel.forward(query, key, value, SCALE, False)
    assert mixed.shape == (2, 3, 40, 24)
    assert log_sums.shape == (2, 3, 40)
    assert log_sums.dtype == torch.float32
    found = kernel.backward(torch.empty_like(mixed), (query, key, value), mixed, log_sums, SCALE, False)
    assert [each.shape for each in found] == [query.shape, key.shape, value.shape]

"""Attention by blocks: tiles of segments, merge by logarithms, backward from the merged result."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.attention import ATTENTION, AttentionKernel, choose_attention
from kernels.attention.blocks import BlockKernelError, choose_block_kernel, fused
from kernels.attention.blocks.attend import MergedAttention, MergedBackward
from kernels.attention.blocks.reference import REFERENCE, BlockKernel
from kernels.attention.blocks.tiles import SegmentCut, VisibleTile, visible_tiles
from kernels.attention.documents import Documents
from tests.kernels.plain import near, randn
from tests.kernels.test_attention import SCALE, by_query, documents_of, flatly

CPU = torch.device("cpu")
KERNELS = {"fused": fused.CPU_FLASH, "reference": REFERENCE}
SIZES = (1, 2, 3, 4)
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
    for seed in range(20 if is_packed else 1):
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


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_of_all_ranks_equal_reading_query_by_query(
    name: str, size: int, is_packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reference splits its queries too.
    monkeypatch.setattr("kernels.attention.blocks.reference._MOST_SCORES", 40)
    tokens = 2 * size * SEGMENT
    positions = places(size, 7) if is_packed else None
    documents = None if positions is None else Documents.from_positions(torch.tensor(positions))
    exact = [randn(2, 3, tokens, 12, seed=seed, dtype=dtype).double().requires_grad_() for seed in range(3)]
    grad = randn(2, 3, tokens, 12, seed=3)
    expected = by_query(*exact, None if positions is None else documents_of(positions))
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
    expected = by_query(*exact, None)
    expected.backward(grad.double())
    whole = [each.clone().requires_grad_() for each in heads]
    result = choose_attention("auto", CPU, torch.bfloat16, is_packed=False).attend(*whole, SCALE, None)
    result.backward(grad)
    made = attend_by_blocks(heads, grad, fused.CPU_FLASH, 4, None)
    for ours, called, right in zip(
        made, [result.detach(), *(each.grad for each in whole)], [expected, *(each.grad for each in exact)], strict=True
    ):
        assert called is not None
        assert right is not None
        assert (ours.double() - right).norm() <= 2 * (called.double() - right).norm() + 1e-12


def test_block_kernels_are_chosen_by_device_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert choose_block_kernel("auto", CPU, torch.bfloat16) is fused.CPU_FLASH
    assert choose_block_kernel("sdpa", cuda, torch.bfloat16) is fused.CUDA_FLASH
    assert choose_block_kernel("auto", cuda, torch.float32) is fused.CUDA_EFFICIENT
    assert choose_block_kernel("auto", cuda, torch.float64) is REFERENCE
    assert fused.CPU_FLASH.widths(24, 20) == (24, 24)
    assert fused.CUDA_FLASH.widths(20, 30) == (32, 32)
    assert REFERENCE.widths(24, 20) == (24, 20)
    message = r"^attention: must return sums of exponentials .*, is flex; nearest valid: auto, sdpa$"
    with pytest.raises(BlockKernelError, match=message):
        choose_block_kernel("flex", CPU, torch.float32)
    plain: AttentionKernel = ATTENTION.get("flash_attention")
    assert not plain.has_blocks


@pytest.mark.parametrize(
    ("kernel", "dtype"), [(fused.CUDA_FLASH, torch.bfloat16), (fused.CUDA_EFFICIENT, torch.float32)]
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

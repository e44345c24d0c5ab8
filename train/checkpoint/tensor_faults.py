"""Compares two tensors of one name, and says how they differ: transposed, permuted, scaled, ...

Shape legend: N rows, D columns, M blocks in a column, T blocks in a row.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig
from model.hf.names import BLOCK, StoredDtype
from model.hf.reader import TORCH_DTYPES

_FP8_LEAST = 2.0**-10  # largest absolute rounding error in units of the scale: half of the smallest number
_BLOCK_ERROR = 0.004  # of a block's mean ratio, by which rounding may move it, plus the next by the number of values
_VALUE_ERROR = 0.2
_PROBES = 16
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class StoredValues:
    """A tensor in float32, the type in which it is stored, and the scales of FP8 in float32, [M, T]."""

    tensor: Tensor
    dtype: StoredDtype
    scales_MT: Tensor | None = None

    @property
    def bits(self) -> float:
        """Relative size of the stored type's last bit."""
        return torch.finfo(TORCH_DTYPES[self.dtype]).eps


def agree(ours: StoredValues, theirs: StoredValues) -> bool:
    """Returns whether two tensors are the same up to one rounding to the coarser of their types.

    With FP8 on one side, or with other scales on each, each value must be within its error, and the mean ratio of each
    block must be 1 within what is left of these errors: the scale of another block may be nearly the right one.
    """
    if ours.dtype == theirs.dtype and (
        ours.scales_MT is None or theirs.scales_MT is None or torch.equal(ours.scales_MT, theirs.scales_MT)
    ):
        return torch.equal(ours.tensor, theirs.tensor)
    if ours.scales_MT is None and theirs.scales_MT is None:
        coarse = TORCH_DTYPES[max(ours, theirs, key=lambda side: side.bits).dtype]
        return torch.equal(ours.tensor.to(coarse), theirs.tensor.to(coarse))
    ratios_MT, allowed_MT = _block_ratios(ours.tensor, theirs.tensor)
    return bool(_near(ours, theirs, theirs.tensor).all() and ((ratios_MT - 1).abs() <= allowed_MT).all())


def describe_fault(
    name: str,
    ours: StoredValues,
    theirs: StoredValues,
    config: ModelConfig,
    others: Callable[[], Iterable[tuple[str, StoredValues]]],
) -> str:
    """Returns how a tensor differs from the expected one of the same shape, as the end of a sentence.

    Args:
        others: reads further expected tensors of that shape, of which the tensor may hold one.
    """
    a, b = ours.tensor, theirs.tensor
    if not a.any():
        return "is zero"
    if a.ndim == 2 and len(a) == a.shape[1] and _near(ours, theirs, b.T).all():
        return "is transposed"
    step = max(ours.bits, theirs.bits)
    if ours.dtype != theirs.dtype and (((a - b).abs() <= step * b.abs()) & (a.abs() <= b.abs())).all():
        return f"is truncated, not rounded, from {theirs.dtype} to {ours.dtype}"
    for other, values in others():
        if other != name and _near(ours, values, values.tensor).all():
            kind = "has swapped experts: it " if ".experts." in name and ".experts." in other else ""
            return f"{kind}holds the values of {other}"
    for axis, words in ((0, "rows"), (1, "columns"))[: a.ndim]:
        source = _permutation(ours, theirs, axis)
        if source is not None:
            return _describe_permutation(name, source, words, config)
    if scale := _describe_scale(ours, theirs):
        return scale
    if ((a - b) - (a - b).flatten()[0]).abs().max() <= 1e-6 * b.abs().max():
        return f"is {(a - b).flatten()[0]:+.4g} off in each element"
    ratio = float((a.double() * b.double()).sum() / b.double().square().sum().clamp_min(1e-300))
    if ratio and not _near(ours, theirs, b).all() and _near(ours, theirs, b * ratio).all():
        return f"is {ratio:.4g} times the expected values"
    wrong = ~_near(ours, theirs, b)
    wrong = wrong if wrong.any() else a != b
    first = wrong.nonzero()[0].tolist()
    at = tuple(first)
    return (
        f"differs in {int(wrong.sum())} of {a.numel()} values: {a[at]:.6g} instead of {b[at]:.6g} at {first}, "
        f"by at most {(a - b).abs().max():.3g}"
    )


def _near(ours: StoredValues, theirs: StoredValues, expected: Tensor) -> Tensor:
    """Returns which values are the expected ones within the error of the stored types."""
    sides = (ours, theirs)
    share = 0.0 if ours.scales_MT is None and ours.dtype == theirs.dtype else sum(side.bits / 2 for side in sides)
    allowed = expected.abs() * share
    for side in sides:
        if side.scales_MT is not None:
            is_aligned = side.tensor.shape == expected.shape
            least = _spread(side.scales_MT, side.tensor) if is_aligned else side.scales_MT.max()
            allowed.add_(least, alpha=_FP8_LEAST)
    return (ours.tensor - expected).abs_() <= allowed


def _spread(blocks_MT: Tensor, values_ND: Tensor) -> Tensor:
    """Returns the number of the block of each value, ND."""
    rows, columns = values_ND.shape
    return blocks_MT.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def _block_ratios(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean ratio of each block, [M, T], and by how much rounding alone may move it."""

    def block_sums(values_ND: Tensor) -> Tensor:
        rows, columns = values_ND.shape
        if rows % BLOCK or columns % BLOCK:
            values_ND = functional.pad(values_ND, (0, -columns % BLOCK, 0, -rows % BLOCK))
        return values_ND.view(len(values_ND) // BLOCK, BLOCK, -1, BLOCK).sum((1, 3))

    largest = theirs.abs().max().clamp_min(1e-30)  # so that fourth powers stay in range
    b = theirs / largest
    products_MT = block_sums(ours * b) / largest
    squares = b.square_()
    squares_MT = block_sums(squares)
    ratios_MT = torch.where(squares_MT > 0, products_MT / squares_MT, 1.0)
    # Number of values that count: one if a single one is much larger than all others.
    counts_MT = (squares_MT**2 / block_sums(squares.square_())).nan_to_num(1.0).clamp_min(1.0)
    return ratios_MT, _BLOCK_ERROR + _VALUE_ERROR / counts_MT.sqrt()


def _describe_scale(ours: StoredValues, theirs: StoredValues) -> str:
    """Returns which blocks have another scale, or an empty text if that is not all that differs."""
    if ours.scales_MT is None:
        return ""
    ratios_MT, allowed_MT = _block_ratios(ours.tensor, theirs.tensor)
    wrong_MT = (ratios_MT - 1).abs() > allowed_MT
    expected = theirs.tensor * _spread(torch.where(wrong_MT, ratios_MT, 1.0), theirs.tensor)
    if not wrong_MT.any() or not _near(ours, theirs, expected).all():
        return ""
    block = wrong_MT.nonzero()[0].tolist()
    ratio = float(ratios_MT[tuple(block)])
    scale = ours.scales_MT[tuple(block)]
    wanted_MT = ours.scales_MT / ratios_MT if theirs.scales_MT is None else theirs.scales_MT
    near_MT = (wanted_MT / scale - 1).abs()
    near_MT[tuple(block)] = torch.inf
    other = divmod(int(near_MT.argmin()), near_MT.shape[1])
    words = f", that of block {list(other)}" if near_MT[other] < allowed_MT[tuple(block)] else ""
    return (
        f"has wrong scales in {int(wrong_MT.sum())} blocks: that of {block} is {ratio:.4g} times the right one{words}"
    )


def _permutation(ours: StoredValues, theirs: StoredValues, axis: int) -> Tensor | None:
    """Returns which expected row or column each one holds, or None if that is not what differs."""
    a, b = (side.tensor.movedim(axis, 0) for side in (ours, theirs))
    if a.ndim == 1:
        source = torch.empty(len(a), dtype=torch.int64)
        source[a.argsort(stable=True)] = b.argsort(stable=True)
    else:
        # The nearest row by its products with a few random vectors: rounding moves these little.
        probes = torch.randn(a.shape[1], _PROBES, generator=torch.Generator().manual_seed(0))
        points = b @ probes
        source = torch.cat([torch.cdist(rows, points).argmin(1) for rows in (a @ probes).split(_ROWS)])
    is_moved = bool((source != torch.arange(len(source))).any())
    return source if is_moved and _near(ours, theirs, theirs.tensor.index_select(axis, source)).all() else None


def _describe_permutation(name: str, source: Tensor, words: str, config: ModelConfig) -> str:
    moved = (source != torch.arange(len(source))).nonzero().flatten()
    rope, head, start = config.rotated_dim, config.qk_head_dim, None
    if name.split(".")[-2] in ("q_b_proj", "q_proj"):
        start = head - rope
    if "kv_a_proj_with_mqa" in name:
        head = config.cached_values
        start = head - rope
    what = f"{len(moved)} of {len(source)} {words} are permuted: {int(moved[0])} holds {int(source[moved[0]])}"
    if words == "rows" and start is not None and (moved % head >= start).all():
        first = int(moved[0]) // head * head + start
        halves = torch.arange(rope).view(rope // 2, 2).T.flatten()
        inside = source[first : first + rope] - first
        order = (
            "halves"
            if torch.equal(inside, halves)
            else "pairs"
            if torch.equal(inside[halves], torch.arange(rope))
            else ""
        )
        return f"has permuted rotary dimensions{f' (in {order}, which the layout has not)' if order else ''}: {what}"
    return f"has permuted {'experts' if '.gate.' in name and words == 'rows' else words}: {what}"

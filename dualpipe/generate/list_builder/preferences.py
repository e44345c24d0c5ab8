"""Defines the preferences of the list builder as numbers, and the presets that it tries."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dualpipe.generate.list_builder.queues import Blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Values of operations and groups. A rank runs the group with the highest value; an I has the value 3.

    Attributes:
        forward: value of an F.
        weight: value of a W.
        filler: additional value of a W in a group with F or I.
        deep_forward: additional value of an F in the last stage relative to the first.
        deep_backward: additional value of an I in the first stage relative to the last.
        leader: additional value of the F of each direction's first micro-batch.
        alone: penalty for exchange that computation of the group does not hide, per mean operation.
        delay: penalty for waiting, per mean operation.
        patience: fraction of a W's time that a rank waits for an input instead of running the W.
        two_forwards: additional value of a group with two F.
        two_backwards: additional value of a group with two I.
        mixed: additional value of a group with F and I.
        reserve: share of a block for which an F leaves room in memory to the other direction.
        same_stage: whether two micro-batches of one stage may share a group where nothing is sent.
        posts_ahead: whether a rank may send while the previous message of the link is not received yet, if the receiver
            can receive it in time.
        block: number of micro-batches by which a block of F is larger than the default.
        first_block: number of micro-batches by which the first block is larger.
        equal_blocks: whether I has the block size of F instead of the default.
    """

    forward: float
    weight: float
    filler: float
    deep_forward: float
    deep_backward: float
    leader: float
    alone: float
    delay: float
    patience: float
    two_forwards: float
    two_backwards: float
    mixed: float
    reserve: float
    same_stage: bool
    posts_ahead: bool
    block: int
    first_block: int
    equal_blocks: bool

    def blocks(self, num_ranks: int, num_directions: int) -> Blocks:
        """Returns the block sizes for a pipeline.

        By default a block has as many micro-batches as ranks share a direction, so that the last one enters when the
        first one has reached the last rank.
        """
        size = max(1, -(-num_ranks // num_directions))
        forward = max(1, size + self.block)
        first = forward + self.first_block
        return Blocks(first=first, forward=forward, backward=forward if self.equal_blocks else size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Preferences for the three parts of a rank's work.

    At both ends of a step a rank waits for other ranks, so it may trade its own work for an earlier message.

    Attributes:
        warm_up: until the rank has run its first I. Only values of F and of groups of F matter.
        steady: between both. Block sizes and the reserve are those of all parts.
        cool_down: when the rank has no F left. Only values of I, W and their groups matter.
    """

    warm_up: Preferences
    steady: Preferences
    cool_down: Preferences


def make_preset(steady: Sequence[float], warm_up: Sequence[float] = (), cool_down: Sequence[float] = ()) -> Preset:
    """Returns a preset from values in the order of fields.

    Args:
        steady: values of all fields.
        warm_up: other values of the fields that matter in the warm-up, or nothing.
        cool_down: other values of the fields that matter in the cool-down, or nothing.
    """
    names = [item.name for item in fields(Preferences)]
    values = Preferences(**_typed(names, steady))
    return Preset(
        warm_up=replace(values, **_typed(_WARM_UP, warm_up)) if warm_up else values,
        steady=values,
        cool_down=replace(values, **_typed(_COOL_DOWN, cool_down)) if cool_down else values,
    )


def _typed(names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    types = dict(zip((item.name for item in fields(Preferences)), _TYPES, strict=True))
    return {name: types[name](value) for name, value in zip(names, values, strict=True)}


_TYPES = (*(float,) * 13, bool, bool, int, int, bool)
_WARM_UP = ("forward", "deep_forward", "leader", "alone", "delay", "two_forwards", "same_stage", "posts_ahead")
_COOL_DOWN = (
    "weight",
    "filler",
    "deep_backward",
    "alone",
    "delay",
    "patience",
    "two_backwards",
    "same_stage",
    "posts_ahead",
)
_TABLE: tuple[tuple[tuple[float, ...], ...], ...] = (
    ((3.24, 0.0, 1.0, 0.19, 0.4, 0.0, 0.05, 5.7, 0.0, -0.84, 0.82, 0.88, 1.0, 0, 0, 0, 0, 0),),
    ((0.19, 1.5, -1.0, 0.49, -0.5, 0.0, 0.72, 4.48, 0.5, 0.46, -0.38, 1.61, 0.0, 0, 0, 0, 0, 0),),
    ((0.56, 0.0, 1.0, 0.19, -0.71, 0.0, 0.05, 5.7, 0.0, -0.84, 0.02, 0.88, 1.0, 1, 0, 0, 0, 0),),
    ((2.66, 0.0, 0.0, 2.05, 0.4, 0.0, 0.57, 5.06, 0.0, -0.84, 0.46, 0.36, 0.0, 1, 1, 0, 1, 0),),
    ((0.15, -2.0, 1.0, 0.74, -2.77, 0.0, 1.67, 3.54, 0.5, -0.46, -0.78, -0.02, 1.0, 1, 0, -1, 0, 1),),
    ((1.68, 0.0, 0.0, -0.58, -2.49, 0.0, 3.63, 5.8, 0.0, -0.66, 0.47, -0.75, 0.0, 1, 0, 0, 0, 1),),
    ((3.93, 0.0, 1.0, 0.53, 1.0, 0.0, 1.47, 3.27, 0.5, 0.08, -0.06, 1.7, 1.0, 0, 1, 0, 0, 0),),
    ((2.23, -2.0, 1.0, -0.97, -1.17, 3.0, 2.67, 5.96, 0.0, -0.76, -0.13, 0.21, 0.0, 0, 0, 0, 0, 1),),
    ((0.72, 1.5, 0.0, 2.87, 1.91, 0.0, 0.98, 4.47, 0.0, -0.96, -0.84, 1.23, 0.0, 1, 1, 0, 0, 1),),
    ((2.08, -2.0, 0.0, 2.65, -1.26, 3.0, 3.33, 3.82, 1.0, 0.04, 0.87, -0.26, 0.0, 0, 1, 0, 0, 1),),
    ((3.35, -2.0, 0.0, 1.99, -1.01, 3.0, 2.68, 0.63, 1.0, 1.23, 0.48, 1.96, 0.5, 1, 0, 0, 0, 1),),
    ((3.24, 0.0, 0.0, 2.05, 0.4, 3.0, 0.53, 5.7, 0.0, -0.84, 0.92, 0.88, 1.0, 1, 1, 0, 0, 0),),
    ((1.78, -2.0, 1.0, 0.74, -2.77, 0.0, 1.67, 2.69, 0.5, -0.66, -0.78, 0.42, 1.0, 1, 0, -1, 0, 1),),
    ((0.42, -2.0, 1.0, 0.02, -0.12, 0.0, 2.4, 4.74, 0.5, -0.64, -0.72, -0.06, 0.5, 1, 0, 1, 0, 1),),
    ((0.71, 1.5, 1.0, 0.53, -1.23, 3.0, 1.47, 3.27, 0.5, 0.33, -0.92, 1.7, 0.0, 1, 1, 0, 1, 0),),
    ((1.68, 0.0, 0.0, -0.58, -2.49, 0.0, 3.63, 5.8, 0.5, -0.39, -0.18, -0.42, 0.0, 1, 0, 0, 0, 1),),
    ((1.68, 0.0, 0.0, -0.58, -2.49, 0.0, 1.97, 4.75, 0.0, -0.39, 0.47, -0.75, 1.0, 1, 0, -1, 0, 1),),
    ((1.2, -2.0, 1.0, 2.7, 0.46, 0.0, 3.39, 5.48, 0.5, -0.89, 1.49, -0.97, 1.0, 1, 1, 1, 0, 1),),
    ((0.02, -2.0, 0.0, -0.58, -2.49, 3.0, 0.39, 5.29, 1.0, -0.33, -0.34, -0.61, 1.0, 1, 0, 0, 1, 1),),
    ((0.15, -2.0, 1.0, 0.74, -2.77, 0.0, 1.67, 3.54, 1.0, -0.46, -0.78, 0.64, 1.0, 1, 0, -1, 0, 1),),
)

PRESETS = tuple(make_preset(*rows) for rows in _TABLE)
"""Preferences that are good for many sizes and costs, the most useful first: a greedy selection by simulation."""

"""Defines the preferences of the list builder as numbers, and the presets that it tries."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Numbers of micro-batches of one direction that run a chunk before the next chunk."""

    first: int
    forward: int
    backward: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Values of operations and groups. A rank runs the group with the highest value; an I has the value 3.

    Attributes:
        filler: additional value of a W in a group with F or I.
        deep_forward: additional value of an F in the last stage relative to the first.
        deep_backward: additional value of an I in the first stage relative to the last.
        leader: additional value of the F of each direction's first micro-batch.
        alone: penalty for exchange that computation of the group does not hide, per mean operation.
        delay: penalty for waiting, per mean operation.
        patience: fraction of a W's time that a rank waits for an input instead of running the W.
        two_forwards: additional value of a group with two F, as `two_backwards` and `mixed` for others.
        reserve: share of a block for which an F leaves room in memory to the other direction.
        same_stage: whether two micro-batches of one stage may share a group where nothing is sent.
        posts_ahead: whether a rank may send while the previous message of the link is not received yet, if the receiver
            can receive it in time.
        block: micro-batches by which a block of F is larger than the default, as `first_block` for the first one.
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
        """Returns the block sizes for a pipeline."""
        size = default_block(num_ranks, num_directions)
        forward = max(1, size + self.block)
        first = forward + self.first_block
        return Blocks(first=first, forward=forward, backward=forward if self.equal_blocks else size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Preferences for the three parts of a rank's work.

    Attributes:
        warm_up: until the rank has run its first I. Only values of F and of groups of F matter.
        steady: between both. Block sizes and the reserve are those of all parts.
        cool_down: when the rank has few F left.
        cool_down_blocks: number of F per chunk that are left when the cool-down begins, in blocks of default size.
    """

    warm_up: Preferences
    steady: Preferences
    cool_down: Preferences
    cool_down_blocks: float = 0.0

    def cool_down_forwards(self, num_ranks: int, num_directions: int, chunks: int) -> float:
        """Returns the number of F of both directions that a rank has left when its cool-down begins."""
        return self.cool_down_blocks * chunks * num_directions * default_block(num_ranks, num_directions)


def read_presets(text: str) -> tuple[Preset, ...]:
    """Reads presets from JSON: names of preferences, and the values of each preset, in one or three parts."""
    record = json.loads(text)
    presets = []
    for entry in record["presets"]:
        parts = [Preferences(**dict(zip(record["preferences"], row, strict=True))) for row in entry["parts"]]
        warm_up, steady, cool_down = parts if len(parts) > 1 else parts * 3
        blocks = entry["cool_down_blocks"]
        presets.append(Preset(warm_up=warm_up, steady=steady, cool_down=cool_down, cool_down_blocks=blocks))
    return tuple(presets)


def default_block(num_ranks: int, num_directions: int) -> int:
    """Returns the ranks of a direction: the last micro-batch enters when the first is at the last rank."""
    return max(1, -(-num_ranks // num_directions))


PRESETS = read_presets(Path(__file__).with_name("presets.json").read_text("utf-8"))
"""Presets that are good for many sizes and costs, the most useful first: a greedy selection by simulation.

`python -m tests.programs.bench.presets` makes such a selection.
"""

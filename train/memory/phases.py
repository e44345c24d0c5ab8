"""Says what each phase of a stage keeps, as measured on the model.

Imports torch only for sizes that are not in the cache.
The key of the cache covers the sizes, torch's version and the source files of the model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

from dualpipe.build import write_if_possible
from model.config import LAYER
from model.size import StageShape
from train.memory.sizes import PartName, PhaseBytes, Sizes


def sizes_folder(cache_dir: str) -> Path:
    """Returns the folder of measured sizes in a cache folder; `~` is expanded."""
    return Path(cache_dir).expanduser() / "sizes"


def stage_phases(by_slice: Sequence[Sizes], stage: StageShape, cache_dir: Path | None = None) -> list[list[PhaseBytes]]:
    """Returns the bytes of a stage's phases in forward order, for each slice of sequences.

    Args:
        by_slice: sizes of the micro-batch that holds each slice; one entry if micro-batches have whole sequences.
        cache_dir: folder of measured sizes; None: they are measured again in every process.
    """
    config = by_slice[0].config
    parts: list[PartName] = ["embedding"] if stage.is_first else []
    parts += ["dense" if layer < config.num_dense_layers else "moe" for layer in stage.layers]
    parts += ["head"] if stage.is_last else []
    bare = tuple(map(_without_exchange, by_slice))
    return [
        [_with_exchange(phase, sizes) for part in parts for phase in _measured(bare, part, cache_dir)[index]]
        for index, sizes in enumerate(by_slice)
    ]


def hidden_bytes(sizes: Sizes, cache_dir: Path | None = None) -> int:
    """Returns the bytes of a hidden state between two stages, and of its gradient."""
    (embedding,) = _measured((_without_exchange(sizes),), "embedding", cache_dir)[0]
    return embedding.values


def _without_exchange(sizes: Sizes) -> Sizes:
    """Returns sizes without a dispatcher's buffers, for which a measurement is made."""
    return replace(sizes, routing=0, to_experts=0, from_experts=0, summing=0)


def _with_exchange(phase: PhaseBytes, sizes: Sizes) -> PhaseBytes:
    """Adds the buffers of a dispatcher to the bytes of an exchange."""
    if phase.kind == "dispatch":
        return replace(
            phase,
            routing=sizes.routing,
            forward_peak=phase.forward_peak + sizes.routing + sizes.to_experts,
            backward_peak=phase.backward_peak + sizes.from_experts + sizes.summing,
        )
    if phase.kind == "combine":
        # A recomputed layer sends its rows again during the exchange of gradients.
        num_exchanges = 2 if LAYER in sizes.computing.recomputed else 1
        return replace(
            phase,
            forward_peak=phase.forward_peak + sizes.from_experts,
            backward_peak=phase.backward_peak + num_exchanges * sizes.to_experts,
        )
    return phase


@lru_cache(maxsize=512)
def _measured(by_slice: tuple[Sizes, ...], part: PartName, cache_dir: Path | None) -> list[list[PhaseBytes]]:
    """Returns the bytes of the phases of one part of a stage, for each slice."""
    if cache_dir is None:
        return _measure(by_slice, part)
    inputs = json.dumps([[asdict(sizes) for sizes in by_slice], part], default=sorted)
    path = cache_dir / f"{part}-{hashlib.sha256((_program_digest() + inputs).encode()).hexdigest()[:24]}.json"
    try:
        checksum, text = path.read_text(encoding="utf-8").split("\n")
        if checksum == hashlib.sha256(text.encode()).hexdigest():
            return [[PhaseBytes(**row) for row in phases] for phases in json.loads(text)]
    except (OSError, ValueError):  # not there, or not what was written
        pass
    measured = _measure(by_slice, part)
    text = json.dumps([[asdict(phase) for phase in phases] for phases in measured])
    write_if_possible(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return measured


def _measure(by_slice: tuple[Sizes, ...], part: PartName) -> list[list[PhaseBytes]]:
    from train.memory.measure import measure_part

    return measure_part(by_slice, part)


@cache
def _program_digest() -> str:
    """Returns a digest of torch's version and of every file that says what a phase keeps."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256(version("torch").encode())
    for folder in ("kernels", "comm/context", "model", "train/memory"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()

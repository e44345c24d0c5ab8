"""Reads the manifest of a mixture: sources with weights, phases and cleaning. Imports no torch.

Weights are positive numbers that need not add up to anything. A source of weight 0 is prepared and not read.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from data.corpus import DataError, describe, list_of, nearest_name, object_of, shorten, text_of
from data.quality.filters import FilterConfig, filter_config

OnBroken = Literal["skip", "stop"]
DedupKind = Literal["exact", "minhash"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixSource:
    """A source of a mixture."""

    name: str  # names a folder and a group of metrics
    paths: tuple[str, ...]  # files, folders and patterns; absolute, or they begin with ~
    weight: float  # share of the sequences, relative to the other weights
    text_field: str = "text"  # field of a row that contains the text
    max_epochs: float | None = None  # number of times that a run may read the source; None: any number
    fim_rate: float | None = None  # share of documents for fill-in-the-middle; None: that of the run


@dataclass(frozen=True, kw_only=True, slots=True)
class MixPhase:
    """Weights that replace those of the sources until a number of tokens of the run."""

    until_tokens: int  # tokens of the run after which the next phase begins, padding included
    weights: Mapping[str, float]  # weights by the name of the source; others keep their weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Sources of a mixture, in the order of their priority for deduplication."""

    sources: tuple[MixSource, ...]
    phases: tuple[MixPhase, ...] = ()  # in order; after the last one, the sources' weights apply
    dedup: DedupKind | None = None  # exact or near duplicates are dropped; None: none
    decontaminate: tuple[str, ...] | None = None  # files of evaluations; None: the shipped tasks; empty: none
    filters: FilterConfig | None = None  # rules that documents must satisfy; None: none
    on_broken: OnBroken = "skip"  # what happens at a row that cannot be read
    max_broken_share: float = 0.001  # share of the rows that may be skipped

    def weights(self, phase: MixPhase | None = None) -> tuple[float, ...]:
        """Returns the weight of each source in a phase, or after the last one."""
        changed = {} if phase is None else phase.weights
        return tuple(changed.get(source.name, source.weight) for source in self.sources)

    def plain(self) -> dict[str, Any]:
        """Returns the values of which `parse_manifest` makes the same manifest."""
        return {**asdict(self), "dedup": None if self.dedup is None else {"kind": self.dedup}}


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest, a YAML file. Relative paths in it start at its folder.

    Raises DataError with the file, the place in it, the rule, the value and the nearest valid choice.
    """
    try:
        loaded = yaml.load(path.expanduser().read_text(encoding="utf-8"), Loader=_ManifestLoader)
        values = json.loads(json.dumps(loaded))  # refuses dates and sets, and makes every key text
    except OSError as error:
        raise DataError(
            f"data.manifest: {str(path)!r} must be a YAML file that can be read: {error.strerror}"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"data.manifest: {path} must be YAML of text, numbers and lists, is not: {reason}") from error
    return parse_manifest(values, str(path), path.expanduser().absolute().parent)


class _ManifestLoader(yaml.SafeLoader):
    """YAML loader that rejects aliases, which could expand to a billion nodes, and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it contains an alias (*); write the value")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"the key {twice[0]!r} occurs twice in line {node.start_mark.line + 1} or below")
        return node


def parse_manifest(values: object, place: str, folder: Path) -> Manifest:
    """Returns the manifest of plain values; relative paths start at the folder, errors with the place."""
    given = object_of(values, place, [field.name for field in fields(Manifest)], ["sources"])
    items = list_of(given["sources"], f"{place}: sources")
    sources = tuple(_source(item, f"{place}: sources[{number}]", folder) for number, item in enumerate(items))
    names = [source.name for source in sources]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(f"{place}: sources[{number}].name: must differ from other names, is {name} again")
    dedup = given.get("dedup")
    if dedup is not None:
        kind = object_of(dedup, f"{place}: dedup", ["kind"], ["kind"])["kind"]
        dedup = _choice(kind, f"{place}: dedup.kind", ("exact", "minhash"))
    files = given.get("decontaminate")
    if files not in (None, []):
        items = list_of(files, f"{place}: decontaminate")
        files = [text_of(item, f"{place}: decontaminate[{number}]") for number, item in enumerate(items)]
    filters = given.get("filters")
    manifest = Manifest(
        sources=sources,
        phases=_phases(given.get("phases") or [], f"{place}: phases", names),
        dedup=dedup,  # type: ignore[arg-type]
        decontaminate=None if files is None else tuple(str(folder / Path(file).expanduser()) for file in files),
        filters=None if filters is None else filter_config(filters, f"{place}: filters"),
        on_broken=_choice(given.get("on_broken", "skip"), f"{place}: on_broken", ("skip", "stop")),  # type: ignore[arg-type]
        max_broken_share=_number(given.get("max_broken_share", 0.001), f"{place}: max_broken_share", most=1.0),
    )
    for number, phase in enumerate((*manifest.phases, None)):
        if not any(manifest.weights(phase)):
            part = "sources" if phase is None else f"phases[{number}].weights"
            raise DataError(f"{place}: {part}: at least one weight must be above 0, all are 0; nearest: 1")
    return manifest


def _source(value: object, place: str, folder: Path) -> MixSource:
    required = ["name", "paths", "weight"]
    given = object_of(value, place, [field.name for field in fields(MixSource)], required)
    name = text_of(given["name"], f"{place}.name")
    if not _NAME.fullmatch(name):
        near = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64] or "source"
        rule = "must be 1 to 64 letters, digits, dots, - and _, and begin with a letter or digit"
        raise DataError(f"{place}.name: {rule}, is {shorten(name)!r}; nearest: {near}")
    items = list_of(given["paths"], f"{place}.paths")
    paths = [text_of(item, f"{place}.paths[{number}]") for number, item in enumerate(items)]
    epochs = given.get("max_epochs")
    rate = given.get("fim_rate")
    return MixSource(
        name=name,
        paths=tuple(path if path.startswith("~") else str(folder / path) for path in paths),
        weight=_number(given["weight"], f"{place}.weight"),
        text_field=text_of(given.get("text_field", "text"), f"{place}.text_field"),
        max_epochs=None if epochs is None else _number(epochs, f"{place}.max_epochs", above_zero=True),
        fim_rate=None if rate is None else _number(rate, f"{place}.fim_rate", most=1.0),
    )


def _phases(value: object, place: str, names: list[str]) -> tuple[MixPhase, ...]:
    phases: list[MixPhase] = []
    for number, item in enumerate(list_of(value, place) if value else ()):
        inner = f"{place}[{number}]"
        given = object_of(item, inner, ["until_tokens", "weights"], ["until_tokens", "weights"])
        until = math.ceil(_number(given["until_tokens"], f"{inner}.until_tokens", above_zero=True))
        if phases and until <= phases[-1].until_tokens:
            least = phases[-1].until_tokens + 1
            rule = f"must be above {phases[-1].until_tokens} of the phase before it"
            raise DataError(f"{inner}.until_tokens: {rule}, is {until}; nearest: {least}")
        weights = object_of(given["weights"], f"{inner}.weights", names)
        numbers = {name: _number(weight, f"{inner}.weights.{name}") for name, weight in weights.items()}
        phases.append(MixPhase(until_tokens=until, weights=numbers))
    return tuple(phases)


def _number(value: object, place: str, *, most: float = math.inf, above_zero: bool = False) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 3e9 as text
        except (ValueError, OverflowError):
            number = math.nan
    if math.isfinite(number) and 0 <= number <= most and (number > 0 or not above_zero):
        return number
    least = "above 0" if above_zero else "0 or above"
    rule = f"must be a number {least}" if most == math.inf else f"must be a number from 0 to {most:g}"
    near = most if math.isfinite(number) and number > most else (1 if above_zero else 0)
    raise DataError(f"{place}: {rule}, is {shorten(str(value))}; nearest: {near:g}")


def _choice(value: object, place: str, choices: tuple[str, ...]) -> str:
    if value in choices:
        return str(value)
    shown = describe(value) if not isinstance(value, str) else value
    raise DataError(
        f"{place}: must be {' or '.join(choices)}, is {shown}; nearest: {nearest_name(str(value), choices)}"
    )

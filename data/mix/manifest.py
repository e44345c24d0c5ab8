"""Reads manifests of mixtures. Imports no torch.

Weights are positive numbers that need not add up to anything. A source of weight 0 is prepared and not read.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from base.ranges import Above, AtLeast, Between
from data.corpus import DataError, Reader, choice_of, list_of, number_of, object_of, optional, shorten, text_of
from data.quality.filters import FilterConfig, filter_config
from data.readers.files import format_of
from data.readers.rows import OnBroken

DedupKind = Literal["exact", "minhash"]
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REQUIRED = ("name", "paths", "weight")
_weight = partial(number_of, limits=AtLeast(0))


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
    on_broken: OnBroken = "stop"  # what happens at a row that cannot be read
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

    A folder of text or a file of text, rows or token ids is a mixture of itself alone. Raises DataError with the file,
    the place in it, the rule, the value and the nearest valid choice.
    """
    text = path.expanduser().absolute()
    if text.is_dir() or format_of(text) is not None:
        name = _fitting_name(text.name.partition(".")[0])
        return Manifest(sources=(MixSource(name=name, paths=(str(text),), weight=1.0),))
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

    def path_of(value: object, at: str) -> str:
        path = text_of(value, at)
        return path if path.startswith("~") else str(folder / path)

    source: Mapping[str, Reader] = {
        "name": _name,
        "paths": partial(list_of, read=path_of),
        "weight": _weight,
        "text_field": text_of,
        "max_epochs": optional(partial(number_of, limits=Above(0))),
        "fim_rate": optional(partial(number_of, limits=Between(0, 1))),
    }
    readers: Mapping[str, Reader] = {
        "sources": partial(list_of, read=lambda item, at: MixSource(**object_of(item, at, source, _REQUIRED))),
        "phases": partial(list_of, read=_phase, can_be_empty=True),
        "dedup": optional(_dedup),
        "decontaminate": optional(partial(list_of, read=path_of, can_be_empty=True)),
        "filters": optional(filter_config),
        "on_broken": partial(choice_of, choices=get_args(OnBroken)),
        "max_broken_share": partial(number_of, limits=Between(0, 1)),
    }
    manifest = Manifest(**object_of(values, f"{place}: ", readers, ["sources"]))
    _check_rules(manifest, f"{place}: ")
    return manifest


def _name(value: object, place: str) -> str:
    name = text_of(value, place)
    if not SOURCE_NAME.fullmatch(name):
        near = _fitting_name(name)
        rule = "must be 1 to 64 letters, digits, dots, - and _, and begin with a letter or digit"
        raise DataError(f"{place}: {rule}, is {shorten(name)!r}; nearest: {near}")
    return name


def _fitting_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64] or "source"


def _dedup(value: object, place: str) -> str:
    fields = object_of(value, place, {"kind": partial(choice_of, choices=get_args(DedupKind))}, ["kind"])
    return str(fields["kind"])


def _phase(value: object, place: str) -> MixPhase:
    readers: Mapping[str, Reader] = {"until_tokens": partial(number_of, limits=Above(0)), "weights": _weights}
    fields = object_of(value, place, readers, list(readers))
    return MixPhase(until_tokens=math.ceil(fields["until_tokens"]), weights=fields["weights"])


def _weights(value: object, place: str) -> dict[str, float]:
    return object_of(value, place, dict.fromkeys(value if isinstance(value, dict) else ["NAME"], _weight))


def _check_rules(manifest: Manifest, place: str) -> None:
    """Rejects names that repeat, phases that do not follow each other, and weights that are all 0."""
    names = [source.name for source in manifest.sources]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(f"{place}sources[{number}].name: must differ from other names, is {name} again")
    before = 0
    for number, phase in enumerate(manifest.phases):
        inner = f"{place}phases[{number}]"
        if phase.until_tokens <= before:
            rule = f"must be above {before} of the phase before it"
            raise DataError(f"{inner}.until_tokens: {rule}, is {phase.until_tokens}; nearest: {before + 1}")
        before = phase.until_tokens
        object_of(dict(phase.weights), f"{inner}.weights", dict.fromkeys(names, _weight))
    for number, changed in enumerate((*manifest.phases, None)):
        if not any(manifest.weights(changed)):
            part = "sources" if changed is None else f"phases[{number}].weights"
            raise DataError(f"{place}{part}: at least one weight must be above 0, all are 0; nearest: 1")

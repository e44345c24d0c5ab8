"""Places experts on the ranks of a deployment by their measured loads: `python -m launch.place`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from base.decode import decode, encode
from base.figures import aligned
from base.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from base.refusal import ConfigError, broken, nearest
from evaluation.run import IDENTITY_NAME, RESULTS_NAME, read_records
from infer.placement import Loads, Placement, PlacementShape, Policy, default_layer, imbalance, rank_loads
from launch.cli.entry import command, preview_of, write_output
from launch.config.compose import compose, system_errors
from launch.config.folder import CONFIG_NAME, read_folder
from model.config import ModelConfig
from train.checkpoint.sources import source_config
from train.files.json_lines import LOADS_NAME, raw_lines, read_line
from train.report.source import read_loads

_TASK = "bits_per_byte"
_BY_SOURCE = "validation_by_source"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceCommandConfig:
    """Configuration of the command. `conf/place.yaml` explains the keys."""

    loads: str
    ranks: PositiveInt
    ranks_per_node: PositiveInt
    redundant: NonNegativeInt | None
    shared: bool
    policy: Literal["auto", "hierarchical", "global"]
    groups: PositiveInt | None
    layers: PositiveInt | None
    steps: PositiveInt
    domains: Mapping[str, NonNegativeFloat] | None
    format: Literal["text", "json", "sglang", "vllm"]
    out: str
    plugins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLoads:
    """Loads of the experts of each layer, what they are of, and the model if it is known."""

    loads: Mapping[int, Loads]
    title: str
    model: ModelConfig | None


Pairs = Mapping[int, tuple[Loads, Loads]]
"""Loads of the ranks as servers start and as placed, by layer."""


def main(overrides: Sequence[str]) -> int:
    """Places the experts of every layer, and shows the placement."""
    config = _decode(overrides)
    with system_errors():
        measured = read_measured(config)
        shape = placement_shape(config, measured)
        placement = Placement(shape=shape, layers={}).rebalanced(measured.loads)
        write_output(_formatted(config, measured, placement), config.out)
    return 0


def _decode(overrides: Sequence[str]) -> PlaceCommandConfig:
    return decode(PlaceCommandConfig, compose("place", overrides))


def read_measured(config: PlaceCommandConfig) -> MeasuredLoads:
    """Reads the loads of a run or of an evaluation, and weights their sources by shares of the traffic."""
    path = Path(config.loads).expanduser()
    is_evaluation = (path / IDENTITY_NAME).is_file()
    file = path / LOADS_NAME if path.is_dir() else path
    if not is_evaluation and not file.is_file():
        rule = f"must be a run's folder, a {LOADS_NAME} or the folder of an evaluation"
        raise broken("loads", rule, repr(config.loads), f"loads=outputs/NAME/TIME with a {LOADS_NAME}")
    by_source, title, model = _read_evaluation(path) if is_evaluation else _read_run(file, config)
    domains = config.domains
    if domains is not None and not any(domains.get(name) for name in by_source):
        raise ConfigError(f"domains: must weight sources of {path}, none has a weight; valid: {', '.join(by_source)}")
    for name in domains or ():
        if name not in by_source:
            raise ConfigError(f"domains: must be sources of {path}, {name!r} is none; {nearest(name, [*by_source])}")
    total: dict[int, Loads] = {}
    for name, loads in by_source.items():
        for layer, load_E in loads.items():
            weight = 1.0 if domains is None else domains.get(name, 0.0) / max(float(load_E.sum()), 1.0)
            total[layer] = total.get(layer, 0.0) + weight * load_E
    if config.shared:
        total = _with_shared(total, model, config)
    return MeasuredLoads(loads=total, title=f"{title}: {', '.join(domains)}" if domains else title, model=model)


def _with_shared(loads: Mapping[int, Loads], model: ModelConfig | None, config: PlaceCommandConfig) -> dict[int, Loads]:
    """Returns the loads followed by those of the shared experts: all tokens of the layer."""
    if model is None or not model.num_shared_experts:
        raise broken("shared", "needs the folder of a run whose model has shared experts", "true", "false")
    if config.format in ("sglang", "vllm"):
        raise broken("shared", f"must be false with format={config.format}, which has no such experts", "true", "false")
    # The router counts each token once for each of its experts.
    tokens = {layer: float(load_E.sum()) / model.num_experts_per_token for layer, load_E in loads.items()}
    return {layer: np.append(load_E, [tokens[layer]] * model.num_shared_experts) for layer, load_E in loads.items()}


def _read_run(file: Path, config: PlaceCommandConfig) -> tuple[dict[str, dict[int, Loads]], str, ModelConfig | None]:
    """Returns the loads of a run's last steps; with domains, those of its validation by source."""
    by_source: dict[str, dict[int, Loads]] = {}
    steps = []
    # A run may be writing its last line.
    lines = [line for line in deque(enumerate(raw_lines(file), 1), config.steps + 1) if line[1].endswith(b"\n")]
    for number, line in lines[-config.steps :]:
        source = f"loads: {file}, line {number}"
        record = read_line(line) or {}
        steps.append(record.get("step", 0))
        sources = {"": record} if config.domains is None else record.get(_BY_SOURCE, {})
        for name, loads in sources.items():
            _add(by_source.setdefault(name, {}), loads, source)
    if not by_source:
        what = "the loads of a MoE layer" if config.domains is None else f"{_BY_SOURCE}, which domains weights"
        raise ConfigError(f"loads: {file} must have a line with {what}, has none")
    model = read_folder(file.parent).model if (file.parent / CONFIG_NAME).is_file() else None
    return by_source, f"steps {steps[0]:,} to {steps[-1]:,} of {file.parent}", model


def _read_evaluation(folder: Path) -> tuple[dict[str, dict[int, Loads]], str, ModelConfig | None]:
    """Returns the loads of an evaluation's documents by source."""
    by_source: dict[str, dict[int, Loads]] = {}
    for record in (record for record in read_records(folder, _TASK) if record.get("num_tokens") != 0):
        source = f"loads: {folder}, document {record['id']!r}"
        _add(by_source.setdefault(str(record.get("source")), {}), record.get("loads"), source)
    if not by_source or not (folder / RESULTS_NAME).is_file():
        raise ConfigError(f"loads: {folder} must be a complete evaluation of {_TASK} with {_TASK}.loads=true, is not")
    weights = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))["checkpoint"]["folder"]
    model = source_config(weights, "loads", drop_mtp=True) if Path(weights).is_dir() else None
    return by_source, str(folder), model


def _add(total: dict[int, Loads], record: Mapping[str, Any] | None, place: str) -> None:
    """Adds the loads of a record by layer; the layers and their experts must be those of earlier records."""
    named = {} if record is None else read_loads(record)
    loads = {
        int(name.removeprefix("layer_")): load_E
        for name, load_E in named.items()
        if name.removeprefix("layer_").isdecimal()
    }
    if not loads or any(load_E.min() < 0 for load_E in loads.values()):
        raise ConfigError(f'{place}: must be an object with loads of 0 or more, as in "layer_3": [8, 0], is not')
    sizes = {layer: len(load_E) for layer, load_E in (total or loads).items()}
    if {layer: len(load_E) for layer, load_E in loads.items()} != sizes or len(set(sizes.values())) > 1:
        raise ConfigError(f"{place}: must have the layers and the number of experts of the others, has not")
    for layer, load_E in sorted(loads.items()):
        total[layer] = total.get(layer, 0.0) + load_E


def placement_shape(config: PlaceCommandConfig, measured: MeasuredLoads) -> PlacementShape:
    """Returns the sizes of the deployment, with the values of keys that are null or auto."""
    num_experts = len(next(iter(measured.loads.values())))
    per_node = min(config.ranks, config.ranks_per_node)
    if config.ranks % per_node:
        near = " or ".join(str(max(per_node, config.ranks // per_node * per_node + more)) for more in (0, per_node))
        raise broken("ranks", f"must be a multiple of ranks_per_node={per_node}", config.ranks, near)
    nodes = config.ranks // per_node
    groups = config.groups or (1 if measured.model is None or config.shared else measured.model.num_expert_groups)
    auto: Policy = "hierarchical" if groups % nodes == 0 else "global"
    policy = auto if config.policy == "auto" else config.policy
    redundant = config.redundant
    if redundant is None:
        redundant = config.ranks - num_experts % config.ranks
        has_room = num_experts + redundant <= config.ranks * (num_experts // (nodes if policy == "hierarchical" else 1))
        redundant = redundant if has_room else -num_experts % config.ranks
    return PlacementShape(
        num_experts=num_experts,
        num_groups=groups,
        num_ranks=config.ranks,
        num_nodes=nodes,
        num_redundant=redundant,
        policy=policy,
    )


def _formatted(config: PlaceCommandConfig, measured: MeasuredLoads, placement: Placement) -> str:
    shape = placement.shape
    layers = placement.layers
    num_layers = config.layers or (max(layers) + 1 if measured.model is None else measured.model.num_layers)
    served = {layer: slots_S.tolist() for layer, slots_S in layers.items() if layer < num_layers}
    pairs = {
        layer: (
            rank_loads(load_E, default_layer(shape), shape.num_ranks),
            rank_loads(load_E, layers[layer], shape.num_ranks),
        )
        for layer, load_E in measured.loads.items()
    }
    match config.format:
        case "sglang":
            # A row for every layer: SGLang counts dense layers too, and has its own order there.
            rows = [served.get(layer, default_layer(shape).tolist()) for layer in range(num_layers)]
            return json.dumps({"physical_to_logical_map": rows})
        case "vllm":
            return json.dumps([*served.values()])
        case "json":
            facts = {"loads": measured.title, **encode(shape)}
            return json.dumps({**facts, "layers": {f"layer_{n}": _values(placement, n, pairs[n]) for n in layers}})
        case "text":
            return "\n".join(_lines(measured.title, placement, pairs))


def _values(placement: Placement, layer: int, pair: tuple[Loads, Loads]) -> dict[str, Any]:
    before, after = pair
    return {
        "max_over_mean_before": imbalance(before),
        "max_over_mean": imbalance(after),
        "rank_loads_before": before.tolist(),
        "rank_loads": after.tolist(),
        "experts": placement.slots(layer).tolist(),
    }


def _headline(placement: Placement) -> str:
    shape = placement.shape
    where = f"{shape.num_ranks} ranks of {shape.num_nodes} node{'s' if shape.num_nodes > 1 else ''}"
    experts = f"{shape.num_experts} experts and {shape.num_redundant} copies"
    return f"{experts} on {where}, {shape.policy}: {placement.num_local_slots} a rank"


def _rows(placement: Placement, pairs: Pairs) -> Iterator[tuple[str, str, str, str]]:
    """Yields a row for each layer: name, max/mean before and after, and the experts with the most copies."""
    for layer, (before, after) in pairs.items():
        copies_E = np.bincount(placement.layers[layer])
        most = [int(expert) for expert in np.argsort(-copies_E, kind="stable")[:4] if copies_E[expert] > 1]
        copied = ", ".join(f"{expert} x {copies_E[expert]}" for expert in most)
        yield f"layer {layer}", f"{imbalance(before):.3f}", f"{imbalance(after):.3f}", copied


def _lines(title: str, placement: Placement, pairs: Pairs) -> Iterator[str]:
    yield f"loads of {title}"
    yield _headline(placement)
    yield ""
    columns = ("layer", "max/mean before", "after", "most copied experts")
    yield from aligned([columns, *_rows(placement, pairs)], text=[0, 3])


preview = preview_of("place", _decode, lambda config: placement_shape(config, read_measured(config)))

if __name__ == "__main__":
    sys.exit(command("place", main, preview))

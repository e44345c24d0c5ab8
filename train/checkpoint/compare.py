"""Checks a converted checkpoint against its source, or against the names of a released model.

One tensor of each is in memory at a time, and then one layer, to compare what the layers compute.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from base.figures import aligned, percent
from base.ranges import NonNegativeInt, PositiveFloat
from base.refusal import ConfigError
from data.tokenizer import Tokenizer, find_tokenizer_file
from kernels.quantize.layout import QuantizedBlocks
from kernels.quantize.reference import dequantize_128x128
from model.config import ModelConfig
from model.hf.checkpoint import open_checkpoint
from model.hf.config import CONFIG_NAME, TOKEN_ID_KEYS
from model.hf.files import HfError, read_json
from model.hf.inference_shards import find_inference_shards, read_inference_shards
from model.hf.names import (
    BIAS_SUFFIX,
    Stored,
    StoredDtype,
    copied_from,
    is_quantized,
    is_rotary,
    layer_of,
    scale_name,
    scale_shape,
    weights,
)
from model.hf.reader import TORCH_DTYPES, all_finite, checked_scales, read_tensor
from train.checkpoint.layer_outputs import LayerSource, compare_outputs
from train.checkpoint.locate import differences
from train.checkpoint.sources import CheckpointReader, is_hf_folder, source_folder
from train.checkpoint.tensor_faults import StoredValues, agree, describe_fault

_UNUSED_KEYS = ("initializer_range", "mtp_depth")  # no forward pass reads the first; tensors show the second
MOST_DESCRIBED = 10  # faults that a report describes; to describe one may read all tensors of a layer
OUTPUTS = "outputs"  # subject of the fault that follows from others
_NUM_IDS = 16
_EXACT = 1e-5  # default tolerances of a layer's output: equal weights, rounded ones, FP8
_ROUNDED = 0.02
_FP8 = 0.2
_PARTS = (
    ("router biases", re.escape(BIAS_SUFFIX)),
    ("routers", r"\.mlp\.gate\."),
    ("routed experts", r"\.mlp\.experts\."),
    ("shared experts", r"\.shared_experts\."),
    ("dense networks", r"\.mlp\."),
    ("norms", r"norm\.weight"),
    ("attention", r"\.self_attn\."),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """The configuration of a check; `conf/convert.yaml` explains the keys."""

    check: str
    like: str
    ids: tuple[NonNegativeInt, ...] | None
    tolerance: PositiveFloat | None
    dtype: Literal["bf16", "float32"] | None
    mtp: Literal["keep", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedWeights:
    """Weights in any layout, by released name. `read` returns a tensor in the type in which it is stored."""

    folder: Path
    config: ModelConfig
    stored: Mapping[str, Stored]
    read: Callable[[str], Tensor]
    left_out: str | None = None

    def values(self, name: str) -> StoredValues:
        """Reads a tensor in float32, dequantized, or raises an `HfError` if a value is not finite."""
        raw = self.read(name)
        scales = None
        values = raw.float()
        if raw.dtype == torch.float8_e4m3fn:
            scales = checked_scales(self.read(scale_name(name)), self.folder, scale_name(name))
            values = dequantize_128x128(QuantizedBlocks(raw, scales), torch.float32)
        if not all_finite(values):
            where = (~values.isfinite()).nonzero()[0].tolist()
            raise HfError(self.folder, name, f"must hold finite numbers, holds {values[tuple(where)]} at {where}")
        return StoredValues(values, self.stored[name].dtype, scales)

    def tensor(self, name: str) -> Tensor:
        """Reads a tensor in float32, as `values` does."""
        return self.values(name).tensor

    def keys(self) -> dict[str, Any]:
        """Returns what is compared of the architecture, and ids of special tokens that `config.json` names."""
        path = self.folder / CONFIG_NAME
        named = read_json(path) if path.is_file() else {}
        return _compared(self.config) | {key: named[key] for key in TOKEN_ID_KEYS if named.get(key) is not None}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that differs, a tensor or a key, and how."""

    subject: str
    problem: str

    def __str__(self) -> str:
        return f"{self.subject} {self.problem}"


def open_weights(path: str, key: str, *, drop_mtp: bool, like: ModelConfig | None = None) -> OpenedWeights:
    """Opens weights and checks their files. Only `like` must have the tensors of its architecture.

    Args:
        like: architecture of weights in a layout without `config.json`.

    Raises:
        CheckpointError, HfError: there are no weights, or their files are damaged.
    """
    folder = Path(path).expanduser()
    if shards := find_inference_shards(folder):
        if like is None:
            raise HfError(folder, CONFIG_NAME, f"must be there in {key}, is not; nearest: this folder as check")
        joined = read_inference_shards(shards)
        return OpenedWeights(
            folder=folder,
            config=replace(like, mtp_depth=0),
            stored={name: tensor.stored for name, tensor in joined.items()},
            read=lambda name: joined[name].read(name),
            left_out="MTP modules, which files for DeepSeek's inference code leave out",
        )
    if is_hf_folder(path):
        checkpoint = open_checkpoint(folder, drop_mtp=drop_mtp, checks_tensors=key == "like")
        entries = checkpoint.entries
        return OpenedWeights(
            folder=folder,
            config=checkpoint.config,
            stored={name: Stored(entry.shape, entry.dtype) for name, entry in entries.items()},
            read=lambda name: read_tensor(entries[name], name),
        )
    folder = source_folder(path, key)
    reader = CheckpointReader(folder, key)
    config = replace(reader.config, mtp_depth=0) if drop_mtp else reader.config
    dtypes = reader.dtypes
    # Copies of MTP modules are not stored: they are the tensors that they copy.
    held = {name: copied_from(name) or name for name, shape in weights(config) if 0 not in shape}
    return OpenedWeights(
        folder=folder,
        config=config,
        stored={name: Stored(shape, dtypes[held[name]]) for name, shape in weights(config) if name in held},
        read=lambda name: reader.tensor(held[name], TORCH_DTYPES[dtypes[held[name]]]),
    )


class WeightsComparison:
    """Collects what differs between weights and others, or the names, shapes and types of an architecture."""

    def __init__(self, ours: OpenedWeights, theirs: OpenedWeights | None, expected: ModelConfig) -> None:
        self._ours = ours
        self._theirs = theirs
        self._config = replace(expected, mtp_depth=0) if ours.left_out else expected
        self._shapes = {name: shape for name, shape in weights(self._config) if 0 not in shape}
        self.faults: list[Fault] = []
        self.has_rounded = False
        self.unreadable: list[str] = []
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        # The type that most tensors of a kind have, by the kind and the expected type.
        types: dict[tuple[str, str], Counter[StoredDtype]] = defaultdict(Counter)
        for name in self._shapes.keys() & ours.stored.keys():
            types[self._type_key(name)][ours.stored[name].dtype] += 1
        self._usual = {key: counter.most_common(1)[0][0] for key, counter in types.items()}

    def run(self) -> None:
        """Compares architecture, names, shapes, types and, if there are other weights, values."""
        before = self._theirs.keys() if self._theirs else _compared(self._config)
        now = {key: value for key, value in self._ours.keys().items() if key in before}
        # A run's checkpoint names no token ids.
        lines = differences("config", {key: before[key] for key in now}, now)
        self.faults += [Fault(*line.split(" ", 1)) for line in lines]
        for name, shape in self._shapes.items():
            outcome, problem = self._compare(name, shape)
            self._counts[self._part(name)][outcome] += 1
            self.has_rounded |= outcome == "rounded"
            if problem:
                self.faults.append(Fault(name, problem))
        scales = {scale_name(name) for name in self._shapes if self._is_fp8(name)}
        for name in sorted(self._ours.stored.keys() - self._shapes.keys() - scales):
            if not is_rotary(name) and 0 not in self._ours.stored[name].shape:
                self._counts[self._part(name)]["different"] += 1
                self.faults.append(Fault(name, "is extra: the other side has no such tensor"))

    def table(self) -> list[str]:
        """Returns a line for each part of the network: how many tensors have each outcome."""
        outcomes = ("equal", "rounded", "different") if self._theirs else ("as named", "different")
        rows = [("part", "tensors", *outcomes)]
        for part, counts in self._counts.items():
            rows.append((part, str(counts.total()), *(str(counts[outcome]) for outcome in outcomes)))
        return aligned(rows, text=[0])

    def types(self) -> str:
        """Returns how many tensors have each type, and which type these have on the other side."""
        pairs = Counter(
            (self._dtype(name), self._ours.stored[name].dtype) for name in self._shapes if name in self._ours.stored
        )
        return ", ".join(
            f"{count} {now}{f' from {before}' if before else ''}" for (before, now), count in pairs.items()
        )

    def _compare(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        """Returns equal, rounded, as named or different, and how a tensor differs."""
        stored = self._ours.stored
        if name not in stored:
            self.unreadable.append(name)
            hint = "; mtp=drop leaves MTP modules out" if (layer_of(name) or 0) >= self._config.num_layers else ""
            return "different", f"is missing{hint}"
        if problem := self._form_problem(name, shape):
            self.unreadable.append(name)
            return "different", problem
        if (problem := self._type_problem(name)) or self._theirs is None:
            return ("different" if problem else "as named"), problem
        ours = self._ours.values(name)
        original = copied_from(name)
        if original is not None and original in stored and not agree(ours, self._ours.values(original)):
            return "different", f"is a stale copy: it must equal {original} in the same checkpoint"
        theirs = self._theirs.values(name)
        if not agree(ours, theirs):
            if len(self.faults) >= MOST_DESCRIBED:
                return "different", "differs"
            return "different", describe_fault(name, ours, theirs, self._config, lambda: self._others(name))
        is_equal = ours.dtype == theirs.dtype and torch.equal(ours.tensor, theirs.tensor)
        return ("equal" if is_equal else "rounded"), ""

    def _form_problem(self, name: str, shape: tuple[int, ...]) -> str:
        """Returns why a tensor cannot be read: its shape, or its scales if it is FP8."""
        ours = self._ours.stored[name]
        if ours.shape != shape:
            kind = "is transposed: it has" if ours.shape == shape[::-1] else "has"
            return f"{kind} shape {list(ours.shape)} instead of {list(shape)}"
        if not self._is_fp8(name):
            return ""
        if not is_quantized(name):
            return "has another type: F8_E4M3, which only linear maps have"
        scales = self._ours.stored.get(scale_name(name))
        if scales is not None and scales.shape == scale_shape(shape):
            return ""
        state = "are missing" if scales is None else f"have shape {list(scales.shape)}"
        return f"needs scales {list(scale_shape(shape))}: {scale_name(name)} {state}"

    def _type_problem(self, name: str) -> str:
        """Returns a problem if a type is coarser than that of other such tensors or the expected bias."""
        usual = self._usual[self._type_key(name)]
        if name.endswith(BIAS_SUFFIX):
            usual = "F32" if self._theirs is None else self._theirs.stored[name].dtype
        dtype = self._ours.stored[name].dtype
        return f"has another type: {dtype} instead of {usual}" if _bits(dtype) > _bits(usual) else ""

    def _others(self, name: str) -> Iterator[tuple[str, StoredValues]]:
        """Reads expected tensors of the same shape, first those of the same layer."""
        assert self._theirs is not None
        tail = name.rsplit(".", 2)[1:]
        same = [other for other, shape in self._shapes.items() if shape == self._shapes[name]]
        for other in sorted(same, key=lambda other: layer_of(other) != layer_of(name)):
            if layer_of(other) == layer_of(name) or (other.rsplit(".", 2)[1:] == tail and ".experts." not in name):
                yield other, self._theirs.values(other)

    def _type_key(self, name: str) -> tuple[str, str]:
        kind = "bias" if name.endswith(BIAS_SUFFIX) else "linear" if is_quantized(name) else "other"
        return kind, self._dtype(name)

    def _dtype(self, name: str) -> str:
        return "" if self._theirs is None else self._theirs.stored[name].dtype

    def _is_fp8(self, name: str) -> bool:
        return name in self._ours.stored and self._ours.stored[name].dtype == "F8_E4M3"

    def _part(self, name: str) -> str:
        if (layer_of(name) or 0) >= self._config.num_layers:
            return "MTP copies" if copied_from(name) else "MTP modules"
        return next((part for part, pattern in _PARTS if re.search(pattern, name)), "embedding and head")


def check_weights(config: CheckConfig, released: ModelConfig | None) -> tuple[list[str], list[Fault]]:
    """Returns the lines of the report, and everything that differs.

    Args:
        released: architecture that `like` names, if it names no folder.

    Raises:
        CheckpointError, HfError, DataError: files are no checkpoint or damaged.
    """
    drop_mtp = config.mtp == "drop"
    theirs = None
    expected = released
    if expected is None:
        theirs = open_weights(config.like, "like", drop_mtp=drop_mtp)
        expected = theirs.config
    elif drop_mtp:
        expected = replace(expected, mtp_depth=0)
    ours = open_weights(config.check, "check", drop_mtp=drop_mtp, like=expected)
    comparison = WeightsComparison(ours, theirs, expected)
    comparison.run()
    faults = comparison.faults
    skipped = [ours.left_out] if ours.left_out else ["MTP modules (mtp=drop)"] if drop_mtp else []
    rows = [
        ("types", comparison.types()),
        ("config", f"{len([f for f in faults if f.subject.startswith('config')])} keys differ"),
    ]
    if theirs is None:
        skipped += ["values", "tokenizer", "outputs"]
    else:
        tokenizer = compare_tokenizers(ours.folder, theirs.folder)
        rows.append(("tokenizer", str(tokenizer)))
        faults += [tokenizer] if isinstance(tokenizer, Fault) else []
        text, output_faults = _compare_outputs(config, comparison, ours, theirs)
        rows.append((OUTPUTS, text))
        faults += output_faults
    skipped += ["chat template", "stored rotary frequencies", "generation_config.json"]
    rows.append(("not compared", ", ".join(skipped)))
    return [*comparison.table(), *aligned(rows, text=[0, 1])], faults


def _compare_outputs(
    config: CheckConfig, comparison: WeightsComparison, ours: OpenedWeights, theirs: OpenedWeights
) -> tuple[str, list[Fault]]:
    """Returns a line about logits and layers, and the first part of the network whose output differs."""
    unreadable = [name for name in comparison.unreadable if copied_from(name) is None]
    # One by one: a file may claim any number of layers.
    pairs = zip_longest(*(weights(replace(side.config, mtp_depth=0)) for side in (ours, theirs)))
    if unreadable or any(first != second for first, second in pairs):
        return f"not compared: {unreadable[0] if unreadable else 'sizes of config.json'} differs", []
    vocab = theirs.config.vocab_size
    ids = config.ids or tuple((7919 * index + 1) % vocab for index in range(_NUM_IDS))
    if max(ids) >= vocab or len(ids) <= theirs.config.mtp_depth + 1:
        rule = f"must be at least {theirs.config.mtp_depth + 2} ids below {vocab}"
        raise ConfigError(f"ids: {rule}, is {list(ids)}; nearest valid: null")
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    our_source, their_source = (LayerSource(side.config, side.tensor, dtype) for side in (ours, theirs))
    report = compare_outputs(our_source, their_source, ids)
    is_fp8 = any(stored.dtype == "F8_E4M3" for side in (ours, theirs) for stored in side.stored.values())
    allowed = config.tolerance or (_EXACT if not comparison.has_rounded else _FP8 if is_fp8 else _ROUNDED)
    text = f"logits of {len(ids)} ids differ by {report.logits:.3g}, {percent(report.same_choices)} same first choices"
    text += f"; layers by at most {max(report.parts.values()):.3g} of {allowed:g}"
    wrong = [(part, value) for part, value in report.parts.items() if not value <= allowed]
    if not wrong:
        return text, []
    part, value = wrong[0]
    problem = (
        f"of {part} differ by {value:.3g} for the same input, more than {allowed:g}: the first of {len(wrong)} parts"
    )
    return f"{text}; first in {part}", [Fault(OUTPUTS, problem)]


def compare_tokenizers(ours: Path, theirs: Path) -> Fault | str:
    """Returns how two folders' tokenizers differ, or a line if they do not or one is missing."""
    paths = [find_tokenizer_file(folder) for folder in (ours, theirs)]
    if paths[0] is None or paths[1] is None:
        lacking = [str(folder) for folder, path in zip((ours, theirs), paths, strict=True) if path is None]
        return f"not compared: none in {' and '.join(lacking)}"
    if paths[0].read_bytes() == paths[1].read_bytes():
        return "the same bytes"
    first, second = (Tokenizer.load(path) for path in paths if path is not None)
    before, now = second.spellings(), first.spellings()
    changed = sorted(number for number in before.keys() | now.keys() if before.get(number) != now.get(number))
    if changed:
        number = changed[0]
        pair = f"token {number} is {now.get(number)!r} instead of {before.get(number)!r}"
        return Fault("tokenizer", f"is another one: {len(changed)} of {len(before)} tokens differ, {pair}")
    rules = [json.loads(tokenizer.serialized) for tokenizer in (first, second)]
    keys = [key for key in rules[0] | rules[1] if rules[0].get(key) != rules[1].get(key)]
    return Fault("tokenizer", f"has the same tokens and other rules: {', '.join(keys)}") if keys else "the same rules"


def _compared(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in _UNUSED_KEYS}


def _bits(dtype: StoredDtype) -> float:
    """Returns the relative size of a type's last bit."""
    return torch.finfo(TORCH_DTYPES[dtype]).eps

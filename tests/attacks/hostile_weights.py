"""Manifests, indices and folders of weights as an attacker may write them: each is a function that changes a copy."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.attacks import hostile

PART = "rank_00000.safetensors"
NORM = "weights.model.norm.weight"
SHARD = "model-00001-of-00002.safetensors"
HF_INDEX = "model.safetensors.index.json"
DIGITS = 10**400
HUGE = 2**62
DEEP_LIST = "[" * 10**5
DEEP_OBJECT = '{"a":' * 10**5
Spoil = Callable[[Path], object]


def model(**values: Any) -> Spoil:
    """Changes keys of the manifest's architecture."""
    return lambda folder: hostile.edit_manifest(folder, lambda record: record["model"].update(values))


def manifest(**values: Any) -> Spoil:
    return lambda folder: hostile.edit_manifest(folder, lambda record: record.update(values))


def dropped(key: str) -> Spoil:
    return lambda folder: hostile.edit_manifest(
        folder, lambda record: (record.pop(key, 0), record["model"].pop(key, 0))
    )


def listed(name: str = PART, **values: Any) -> Spoil:
    """Changes what the manifest lists of a file."""

    def change(record: dict[str, Any]) -> None:
        record["files"].setdefault(name, {}).update(values)

    return lambda folder: hostile.edit_manifest(folder, change)


def raw(name: str, content: bytes | str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def number(name: str, key: str, text: str) -> Spoil:
    """Writes a number that Python's writer of JSON does not write in place of a key's value."""

    def write(folder: Path) -> None:
        before = (folder / name).read_text()
        (folder / name).write_text(before.replace(f'"{key}": ', f'"{key}": {text}, "x": ', 1))

    return write


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    """Puts a link, a pipe, a folder or nothing in place of a file."""

    def put(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return put


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nothing(path: Path) -> None:
    """Leaves the place of a file empty."""


def index(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return both(lambda folder: hostile.edit_index(folder, change), hostile.rehash)


def tensor(**values: Any) -> Spoil:
    return index(lambda record: record["tensors"][NORM].update(values))


def keys(**values: Any) -> Spoil:
    """Changes keys of `config.json`, of which None is left out."""

    def change(folder: Path) -> None:
        record = {**json.loads((folder / "config.json").read_text()), **values}
        (folder / "config.json").write_text(json.dumps(record))

    return change


def weight_map(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def edit(folder: Path) -> None:
        record = json.loads((folder / HF_INDEX).read_text())
        change(record["weight_map"])
        (folder / HF_INDEX).write_text(json.dumps(record))

    return edit


def shard_tensor(**values: Any) -> Spoil:
    """Changes the first tensor in the header of a shard."""

    def change(header: dict[str, Any]) -> None:
        next(value for name, value in header.items() if name != "__metadata__").update(values)

    return lambda folder: hostile.edit_header(folder / SHARD, change)


def yarn(**values: Any) -> dict[str, Any]:
    usual = {"factor": 8.0, "original_max_position_tokens": 16, "beta_fast": 32.0, "beta_slow": 1.0}
    return {"kind": "yarn", **usual, "mscale": 1.0, "mscale_all_dim": 1.0, **values}


SIZES = ("vocab_size", "hidden_size", "num_layers", "dense_intermediate_size", "num_routed_experts")
MANIFESTS: Mapping[str, Spoil] = {
    "2^62 layers": model(num_layers=HUGE),
    "10^9 layers": model(num_layers=10**9),
    "10^9 MTP modules": model(mtp_depth=10**9),
    "2^62 dense layers": model(num_layers=HUGE, num_dense_layers=HUGE),
    "10^9 experts": model(num_routed_experts=10**9),
    "2^62 positions and layers": model(max_position_tokens=HUGE, num_layers=HUGE),
    "a hidden size of 2^62": model(hidden_size=HUGE),
    "a vocabulary of 400 digits": model(vocab_size=DIGITS),
    "sizes of 400 digits": model(**dict.fromkeys(SIZES, DIGITS)),
    "sizes of 4,000 digits": model(**dict.fromkeys(SIZES, 10**4000)),
    "a negative size": model(hidden_size=-64),
    "a size of zero": model(hidden_size=0),
    "a fractional size": model(hidden_size=64.5),
    "a float as size": model(hidden_size=64.0),
    "a text as size": model(hidden_size="64"),
    "a bool as size": model(num_heads=True),
    "a list as size": model(num_layers=[2]),
    "null as size": model(num_layers=None),
    "a missing size": dropped("num_layers"),
    "an unknown size": model(num_towers=3),
    "no architecture": manifest(model=None),
    "a list as architecture": manifest(model=[1, 2]),
    "more experts a token than there are": model(num_experts_per_token=1000),
    "groups that do not divide experts": model(num_expert_groups=3),
    "more groups a token than there are": model(num_limited_groups=100),
    "an odd rotation": model(qk_rope_head_dim=7),
    "a rotation of one": model(qk_rope_head_dim=1),
    "NaN": number("manifest.json", "norm_eps", "NaN"),
    "Infinity": number("manifest.json", "routed_scaling_factor", "Infinity"),
    "1e400": number("manifest.json", "norm_eps", "1e400"),
    "rotation of another kind": model(rope_scaling={"kind": "unknown"}),
    "YaRN of 1e308": model(rope_scaling=yarn(factor=1e308, beta_fast=1e308, mscale=1e308)),
    "YaRN of base one": model(rope_theta=1.0, rope_scaling=yarn()),
    "YaRN of 400 digits": model(rope_scaling=yarn(original_max_position_tokens=DIGITS)),
    "a negative step": manifest(step=-1),
    "a step of 400 digits": manifest(step=DIGITS),
    "a float as step": manifest(step=1.5),
    "a missing step": dropped("step"),
    "a bool as version": manifest(format_version=True),
    "a list as version": manifest(format_version=[4]),
    "a deep manifest": raw("manifest.json", DEEP_LIST),
    "a deep object": raw("manifest.json", DEEP_OBJECT),
    "an empty manifest": raw("manifest.json", ""),
    "a binary manifest": raw("manifest.json", bytes(range(256))),
    "a number of 10^6 digits": raw("manifest.json", '{"step": ' + "1" * 10**6 + "}"),
    "a manifest that is a pipe": replaced("manifest.json", os.mkfifo),
    "a manifest that is a folder": replaced("manifest.json", Path.mkdir),
    "a manifest that links to a device": replaced("manifest.json", device),
    "an index that is a pipe": replaced("index.json", os.mkfifo),
    "an index that is a folder": replaced("index.json", Path.mkdir),
    "an index that links to a device": replaced("index.json", device),
    "a missing index": replaced("index.json", nothing),
    "a deep index": raw("index.json", DEEP_LIST),
    "a deep object as index": raw("index.json", '{"files":[],"tensors":' + DEEP_OBJECT),
    "weights that are a pipe": replaced(PART, os.mkfifo),
    "weights that are a folder": replaced(PART, Path.mkdir),
    "weights that are empty": raw(PART, ""),
    "weights that link to a device": replaced(PART, device),
    "weights that link to themselves": lambda folder: hostile.loop(folder / PART),
    "missing weights": replaced(PART, nothing),
    "weights of 1 TiB for such an architecture": both(
        lambda folder: hostile.sparse(folder / PART), model(vocab_size=2**34), listed(bytes=hostile.ONE_TIB)
    ),
    "a huge shape": tensor(shape=[HUGE]),
    "a negative shape": tensor(shape=[-1]),
    "a float as shape": tensor(shape=[64.0]),
    "NaN as shape": tensor(shape=[float("nan")]),
    "another shape": tensor(shape=[8, 8]),
    "an object as type": tensor(dtype={"a": 1}),
    "100,000 parts without elements": index(
        lambda record: record["tensors"][NORM]["parts"].extend([[0, 0, 0, 0]] * 10**5)
    ),
    "a tensor less": index(lambda record: record["tensors"].pop(NORM)),
    "a file outside the folder": index(lambda record: record.update(files=["../../etc/passwd.safetensors"])),
}
"""Changes of a checkpoint that no command reads."""

PRECISIONS: Mapping[str, Spoil] = {
    "a list as precision": manifest(precision=["fp8"]),
    "a list as kind of precision": manifest(precision={"kind": ["fp8"]}),
    "unknown precision": manifest(precision={"kind": "int3"}),
    "a list as products": manifest(precision={"kind": "fp8"}, products=["a"]),
}
"""Changes of the precision of the run, which commands read that compute in it."""

RESUMED: Mapping[str, Spoil] = {
    "a huge size": listed(bytes=2**70),
    "a negative size": listed(bytes=-1),
    "a float as size": listed(bytes=1e300),
    "a size of 400 digits": listed(bytes=DIGITS),
    "NaN as size": number("manifest.json", "bytes", "NaN"),
    "a list of files": manifest(files=[PART]),
    "null as files": manifest(files=None),
    "a file outside": listed("../../x", bytes=1, sha256=""),
    "a name of 5,000 characters": listed("a" * 5000, bytes=1, sha256=""),
    "half a surrogate as name": listed("\udc00", bytes=1, sha256=""),
}
"""Changes of what the manifest lists, which commands read that hash the files."""

FOLDERS: Mapping[str, Spoil] = {
    "2^62 layers": keys(num_hidden_layers=HUGE),
    "2^62 dense layers": keys(num_hidden_layers=HUGE, first_k_dense_replace=HUGE),
    "10^9 MTP modules": keys(num_nextn_predict_layers=10**9),
    "2^62 experts": keys(n_routed_experts=HUGE, n_group=HUGE, topk_group=HUGE, num_experts_per_tok=HUGE),
    "a hidden size of 400 digits": keys(hidden_size=DIGITS),
    "a negative size": keys(hidden_size=-1),
    "a float as size": keys(vocab_size=48.0),
    "a bool as size": keys(num_attention_heads=True),
    "null as size": keys(num_attention_heads=None),
    "NaN": keys(rms_norm_eps=float("nan")),
    "Infinity": keys(routed_scaling_factor=float("inf")),
    "1e400": number("config.json", "rope_theta", "1e400"),
    "a list as type": keys(model_type=["deepseek_v3"]),
    "a list as rope_scaling": keys(rope_scaling=[1]),
    "YaRN of 1e308": keys(rope_scaling={"type": "yarn", "factor": 1e308, "beta_fast": 1e308, "mscale": 1e308}),
    "a list as quantization": keys(quantization_config=[1]),
    "an object as token": keys(eos_token_id={"a": 1}),
    "a deep config": raw("config.json", DEEP_LIST),
    "an empty config": raw("config.json", ""),
    "a config that is a pipe": replaced("config.json", os.mkfifo),
    "a config that links to a device": replaced("config.json", device),
    "a config of 1 TiB": lambda folder: hostile.sparse(folder / "config.json"),
    "a file outside the folder": weight_map(lambda files: files.update({next(iter(files)): "../x.safetensors"})),
    "a number as file": weight_map(lambda files: files.update({next(iter(files)): 3})),
    "a missing file": weight_map(lambda files: files.update({next(iter(files)): "x.safetensors"})),
    "an index without tensors": weight_map(dict.clear),
    "a deep index": raw(HF_INDEX, DEEP_OBJECT),
    "an index that is a pipe": replaced(HF_INDEX, os.mkfifo),
    "a shard that is a pipe": replaced(SHARD, os.mkfifo),
    "a shard that is a folder": replaced(SHARD, Path.mkdir),
    "a shard that links to a device": replaced(SHARD, device),
    "an empty shard": raw(SHARD, ""),
    "a shard of 1 TiB": lambda folder: hostile.sparse(folder / SHARD),
    "a shard cut short": lambda folder: os.truncate(folder / SHARD, 2000),
    "a deep header": raw(SHARD, (10**5).to_bytes(8, "little") + DEEP_LIST.encode()),
    "a huge shape": shard_tensor(shape=[HUGE, HUGE]),
    "a negative shape": shard_tensor(shape=[-1]),
    "a text as offsets": shard_tensor(data_offsets="ab"),
}
"""Changes of a Hugging Face folder that no command reads."""

"""Converts or checks weights of Hugging Face folders and checkpoints: `python -m launch.convert`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.decode import decode, encode
from base.refusal import ConfigError, broken, nearest
from comm.exits import EXIT_UNVERIFIED
from launch import unwound_by_signals
from launch.cli.entry import check_new_folder, command, preview_of
from launch.config.compose import compose, compose_defaults, read_option, system_errors
from model.config import ModelConfig
from model.hf.config import check_format
from train.checkpoint.sources import Conversion, WeightsForm, is_hf_folder, source_config

RELEASED = {
    "deepseek_v3": "v3_671b",
    "deepseek_v3_1": "v3_671b",
    "deepseek_r1": "v3_671b",
    "moonlight_16b": "moonlight_16b",
    "glm_4_7_flash": "glm_flash_30b",
    "qwen3_30b": "qwen3_30b",
}
"""Models that `like` may name, and the options of `model` with their sizes."""
_CHECK_KEYS = ("check", "like", "ids", "tolerance", "dtype", "mtp")
UNREAD = {"from": None, "path": None, "to": None}  # keys that a check has not


def main(overrides: Sequence[str]) -> int:
    """Converts weights tensor by tensor. If they cannot be read or written, nothing is left at `to`.

    Returns the exit code: with `check`, 3 if the weights differ from `like`.
    """
    if is_check(overrides):
        return _run_check(overrides)
    config = _read(overrides)
    with system_errors(), unwound_by_signals():
        _check(config)
        # Printed first: importing torch takes a second or more.
        print(f"reading {config.path}", file=sys.stderr, flush=True)
        from train.checkpoint.convert import convert

        print(convert(config, lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


def is_check(overrides: Sequence[str]) -> bool:
    """Returns whether weights are checked instead of converted."""
    return compose("convert", overrides, UNREAD)["check"] is not None


def _run_check(overrides: Sequence[str]) -> int:
    """Prints what is equal and what differs, and returns the exit code."""
    values, released = _read_check(overrides)
    with system_errors(), unwound_by_signals():
        print(f"reading {values['check']}", file=sys.stderr, flush=True)
        from train.checkpoint.compare import MOST_DESCRIBED, OUTPUTS, CheckConfig, check_weights

        config = decode(CheckConfig, values)
        lines, faults = check_weights(config, released)
    print("\n".join([f"{config.check} against {config.like}", *lines]))
    if not faults:
        print("no difference" if released is None else "no difference in names, shapes, types and config")
        return 0
    further = sum(fault.subject != OUTPUTS for fault in faults[1:])
    print(f"different: {faults[0]}; {further} further tensors or keys")
    for fault in faults[1:MOST_DESCRIBED]:
        print(f"           {fault}")
    return EXIT_UNVERIFIED


def _read_check(overrides: Sequence[str]) -> tuple[dict[str, Any], ModelConfig | None]:
    """Returns the keys of a check, and the architecture that `like` names, if it is no folder."""
    values = compose("convert", overrides, UNREAD)
    defaults = {**compose_defaults("convert"), **UNREAD}
    for key in values.keys() - _CHECK_KEYS:
        if values[key] != defaults[key]:
            raise broken(key, "must be absent with check", values[key], f"no {key}")
    checked = {key: values[key] for key in _CHECK_KEYS}
    if not isinstance(values["check"], str) or not Path(values["check"]).expanduser().is_dir():
        raise ConfigError(f"check: must be a folder with weights, {values['check']!r} is no folder")
    like = values["like"]
    if isinstance(like, str) and Path(like).expanduser().is_dir():
        return checked, None
    if like not in RELEASED:
        rule = f"must be a folder with weights or one of {', '.join(RELEASED)}"
        raise ConfigError(f"like: {rule}, is {like!r}; {nearest(str(like), list(RELEASED))}")
    return checked, decode(ModelConfig, {**read_option("model", RELEASED[like]), "head": "tokens"}, "like")


def _read(overrides: Sequence[str]) -> Conversion:
    values = compose("convert", overrides)
    for key in ("check", "like", "ids", "tolerance"):
        if values.pop(key) is not None:
            raise ConfigError(f"{key}: must be null without check; nearest valid: check=FOLDER")
    # `from` is a Python keyword and cannot name a field.
    source = decode(WeightsForm, values.pop("from", None), "from")  # type: ignore[arg-type, var-annotated]
    if "source" in values:
        raise ConfigError("source: unknown key; did you mean from?")
    return decode(Conversion, {**values, "source": source})


def _check(config: Conversion) -> None:
    """Checks what needs no torch: a Hugging Face folder except its values, or a checkpoint's manifest."""
    _check_path(config)
    if config.source == config.target == "checkpoint":
        raise ConfigError("format: must be hf with from=checkpoint, is checkpoint; nearest valid: format=hf")
    if config.target == "checkpoint" and config.dtype == "fp8":
        raise ConfigError("dtype: must be bf16 or float32 in a checkpoint, is fp8; nearest valid: bf16, or format=hf")
    if config.source == "hf" and config.weights == "ema":
        raise ConfigError("weights: must be trained with from=hf, is ema; nearest valid: trained")
    if config.chat_template is not None and config.target == "checkpoint":
        raise broken(
            "chat_template", "must be null in a checkpoint, which no server reads", config.chat_template, "null"
        )
    check_new_folder("to", config.to)
    model = source_config(config.path, "path", drop_mtp=config.drop_mtp)
    if config.target == "hf":
        check_format(model)


def _check_path(config: Conversion) -> None:
    if not Path(config.path).expanduser().is_dir():
        raise ConfigError(f"path: must be a folder with weights, {config.path!r} is no folder")
    if config.source == "checkpoint" and is_hf_folder(config.path):
        raise broken("from", f"must be hf, as path={config.path} is a Hugging Face folder", "checkpoint", "from=hf")
    if config.source == "hf" and not is_hf_folder(config.path):
        rule = "must be checkpoint unless path is a Hugging Face folder with a config.json"
        raise broken("from", rule, f"hf with path={config.path}", "from=checkpoint")


def _to_plain(config: Conversion) -> dict[str, Any]:
    values = encode(config)
    return {"from": values.pop("source"), **values}


def preview(overrides: Sequence[str]) -> str:
    """Returns the checked configuration of a conversion or of a check as YAML."""
    if is_check(overrides):
        return preview_of("convert", lambda given: _read_check(given)[0], to_plain=dict)(overrides)
    return preview_of("convert", _read, _check, _to_plain)(overrides)


if __name__ == "__main__":
    sys.exit(command("convert", main, preview))

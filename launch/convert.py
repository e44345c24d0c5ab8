"""Converts weights between Hugging Face folders and checkpoints: `python -m launch.convert`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.decode import decode, encode
from base.refusal import ConfigError, broken
from launch import unwound_by_signals
from launch.cli.entry import check_new_folder, command, preview_of
from launch.config.compose import compose, system_errors
from train.checkpoint.sources import Conversion, WeightsForm, is_hf_folder, source_config


def main(overrides: Sequence[str]) -> int:
    """Converts weights tensor by tensor. If they cannot be read or written, nothing is left at `to`."""
    config = _read(overrides)
    with system_errors(), unwound_by_signals():
        _check(config)
        # Printed first: importing torch takes a second or more.
        print(f"reading {config.path}", file=sys.stderr, flush=True)
        from train.checkpoint.convert import convert

        print(convert(config, lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


def _read(overrides: Sequence[str]) -> Conversion:
    values = compose("convert", overrides)
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
    source_config(config.path, "path", drop_mtp=config.drop_mtp)


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


preview = preview_of("convert", _read, _check, _to_plain)

if __name__ == "__main__":
    sys.exit(command("convert", main, preview))

"""Prints the additional peak memory of conversions of a checkpoint with many shards.

`python -m tests.launch.conversion_memory FOLDER`: one JSON object, bytes by conversion.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal
from zlib import crc32

import torch

from model.config import ModelConfig
from model.hf.names import stored_tensors
from model.hf.writer import write_hf
from tests.model.hf_memory import status
from tests.tiny import MODEL
from train.checkpoint.convert import convert
from train.checkpoint.sources import Conversion

SHARD_BYTES = 4_000_000
# 13 million weights in bf16: tensors of at most 1 MB in 7 files.
LARGE = replace(
    MODEL,
    vocab_size=1000,
    hidden_size=256,
    num_routed_experts=64,
    expert_intermediate_size=128,
    dense_intermediate_size=512,
    num_layers=3,
    mtp_depth=0,
)


def make(folder: Path, config: ModelConfig, *, fp8: bool) -> None:
    """Random weights in Hugging Face form."""
    plan = stored_tensors(config, dtype="BF16", fp8=fp8)

    def tensor(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        return torch.empty(plan[name].shape).normal_(0.0, 0.02, generator=generator)

    write_hf(folder, config, plan, tensor, max_shard_bytes=SHARD_BYTES)


def peak_above(run: Callable[[], object]) -> int:
    """Returns the peak of resident memory during a call, in bytes above the value before it. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def run_all(folder: Path, config: ModelConfig, shard_bytes: int) -> dict[str, int]:
    """Returns the peak in bytes for each direction of conversion."""
    make(folder / "hf", config, fp8=False)
    make(folder / "fp8", config, fp8=True)
    peaks: dict[str, int] = {}
    for source, target, form in (
        ("hf", "checkpoint", "checkpoint"),
        ("fp8", "checkpoint_of_fp8", "checkpoint"),
        ("checkpoint", "hf_of_checkpoint", "hf"),
        ("fp8", "bf16_of_fp8", "hf"),
    ):
        peaks[target] = peak_of(folder, source, target, form, shard_bytes)  # type: ignore[arg-type]
    return peaks


def peak_of(folder: Path, source: str, target: str, form: Literal["hf", "checkpoint"], shard_bytes: int) -> int:
    conversion = Conversion(
        source="checkpoint" if source == "checkpoint" else "hf",
        path=str(folder / source),
        to=str(folder / target),
        format=form,
        dtype="bf16" if target == "bf16_of_fp8" else None,
        max_shard_bytes=shard_bytes,
        weights="trained",
        mtp="keep",
        accept_template=False,
        chat_template=None,
        processes=1,
    )
    return peak_above(lambda: convert(conversion, lambda line: None))


def main(folder: Path) -> None:
    """Measures small conversions first, so that code that is loaded on first use does not count."""
    run_all(folder / "small", MODEL, SHARD_BYTES)
    peaks = run_all(folder / "large", LARGE, SHARD_BYTES)
    peaks["one_file"] = peak_of(folder / "large", "hf", "whole", "checkpoint", 10**12)
    peaks["seen"] = peak_above(lambda: b"1" * 2**25)  # shows that a peak is seen
    peaks["num_files"] = len(list((folder / "large" / "checkpoint").glob("*.safetensors")))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

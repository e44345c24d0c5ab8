"""Reads the configuration of the golden training step, and names its runs. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from base.decode import decode
from base.ranges import NonNegativeInt, PositiveInt
from comm.config import ParallelismConfig
from model.config import ModelConfig
from train.config import BatchConfig, EmaConfig
from train.optim.registry import AdamWConfig
from train.tasks.samples import SftConfig

Precision = Literal["float64", "float32", "bf16", "fp8"]
Size = Literal["small", "fused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenRun:
    """The layout and the arithmetic of one run of the steps."""

    parallelism: ParallelismConfig
    micro_sequences: PositiveInt
    precision: Precision = "float64"


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenConfig:
    """The golden step: model, batch and numbers; `axes` has one run for each axis."""

    seed: NonNegativeInt
    model: ModelConfig
    batch: BatchConfig
    task: SftConfig
    optim: AdamWConfig
    ema: EmaConfig
    axes: Mapping[str, GoldenRun]

    def plain_run(self, precision: Precision) -> GoldenRun:
        """Returns the run of one rank that has the whole batch as one micro-batch."""
        alone = ParallelismConfig(pipeline=1, data=1, expert=1)
        return GoldenRun(parallelism=alone, micro_sequences=self.batch.global_sequences, precision=precision)


def read_golden(size: Size = "small") -> tuple[GoldenConfig, dict[str, Any]]:
    """Returns the configuration of the golden step with the model of a size, and its plain values."""
    values: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("golden.yaml").read_text("utf-8"))
    values["model"] |= values.pop("sizes")[size]
    return decode(GoldenConfig, values), values

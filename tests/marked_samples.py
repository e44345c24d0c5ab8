"""Registers a data source of random samples of which between none and all tokens are targets."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from base.ranges import PositiveInt
from comm.config import ParallelismConfig
from data.pack import WEIGHTS
from data.registry import DATA_SOURCES, CorpusFile, DataSource, DataSourceEntry, Document, SamplePiece, TrainingSample
from data.tokenizer import Tokenizer
from dualpipe.registry import ScheduleConfig
from tests.tiny import tiny_config
from train.config import TokenSchedule, TrainConfig
from train.tasks.samples import SftConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkedSource(DataSource):
    """Samples of 2 to 24 tokens.

    Attributes:
        unmarked: one of this many samples has no token that is a target, but fills a sequence alone.
        has_fractions: whether weights are fractions instead of 0 and 1.
    """

    num_samples: PositiveInt
    unmarked: PositiveInt = 4
    has_fractions: bool = False


def marked_samples(source: MarkedSource, tokenizer: Tokenizer) -> Iterator[TrainingSample]:
    """Yields the samples, the same for the same configuration."""
    generator = np.random.Generator(np.random.Philox(5))
    for number in range(source.num_samples):
        is_unmarked = number % source.unmarked == 0
        length = 24 if is_unmarked else int(generator.integers(2, 24))
        tokens = generator.integers(3, tokenizer.vocab_size, length)
        weights = (generator.random(length) < generator.random()).astype(np.float32)
        if source.has_fractions:
            weights *= generator.choice(np.array([0.25, 0.5, 3.0], dtype=np.float32), length)
        weights[0] = 1.0
        if is_unmarked:
            # Only the last position has a weight, and it has no token to predict.
            weights[:] = 0.0
            weights[-1] = 1.0
        piece = SamplePiece(tokens=tokens, values={WEIGHTS: weights})
        yield TrainingSample(key=str(number), pieces=(piece,), may_be_cut=True)


def _read(source: MarkedSource, file: CorpusFile, limit: int | None) -> Iterator[Document]:
    yield Document(key="0", text="text from which a tokenizer is trained")


DATA_SOURCES.register(
    "marked",
    DataSourceEntry(
        summary="random samples for tests",
        config=MarkedSource,
        files=lambda source: (CorpusFile(key="marked", path=Path(__file__)),),
        read=_read,
        place=lambda source: "data",
        settings=lambda source: [source.num_samples, source.unmarked, source.has_fractions],
        samples=marked_samples,
    ),
)


SFT = SftConfig(
    kind="sft",
    steps=2,
    epochs=None,
    mtp_loss_weight=TokenSchedule.constant(0.1),
    balance_loss_weight=0.01,
    bias_update_rate=TokenSchedule.constant(0.0),
)


def sft_config(folder: Path, *, pipeline: int = 1, data: int = 1, expert: int = 1, **source: Any) -> TrainConfig:
    """Returns a run of supervised fine-tuning on these samples, with as few micro-batches as DualPipe takes."""
    config = tiny_config(
        folder,
        task=SFT,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", chunks=None, pairing="overlapped"),
    )
    marked = MarkedSource(kind="marked", **{"num_samples": 160, **source})
    return replace(
        config,
        data=replace(config.data, source=marked),
        batch=replace(config.batch, document_mask=True, global_sequences=max(4, 2 * pipeline) * data),
        model=replace(config.model, num_layers=max(3, pipeline)),
    )

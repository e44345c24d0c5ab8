"""Generates what a finished run shows: a continuation of its prompt, and answers to held-out prompts.

Shape legend: N sequences, L tokens per sequence.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.pack import WEIGHTS
from data.prepare import Prepared
from data.registry import DATA_SOURCES
from infer.config import Sampling
from infer.generate import Continuation, generate
from infer.protocol import decode_after
from model.transformer import Transformer
from train.checkpoint import load as checkpoint
from train.checkpoint.locate import step_folder
from train.config import TrainConfig
from train.files.secrets import redact
from train.listeners.listener import Listener, Moment
from train.network import weight_dtype
from train.report.journals import HeldOutAnswer, write_answers
from train.tasks.registry import TASKS


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Token ids of a prompt, and of the answer that the data have."""

    prompt: list[int]
    reference: list[int]


class Samples(Listener):
    """The samples of a finished run. Rank 0 alone loads the whole model from the last checkpoint."""

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        is_over = num_done >= self._parts.config.task.steps
        return is_over and self._parts.learner.world.rank == 0 and self._parts.config.model.head == "tokens"

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        report_samples(self._parts.config, self._parts.prepared, self._parts.reporter.show)
        return {}


def report_samples(config: TrainConfig, prepared: Prepared, say: Callable[[str], None]) -> None:
    """Generates and reports samples with the run's last checkpoint, which this process alone loads whole."""
    samples = config.samples
    has_answers = WEIGHTS in TASKS.get(config.task.kind).values and len(prepared.validation_tokens_NL) > 0
    # A model of chats continues no plain text; its held-out prompts are chats.
    continues = samples.prompt and DATA_SOURCES.get(config.data.source.kind).chat_template is None
    if not samples.tokens or not (continues or (samples.held_out and has_answers)):
        return
    folder = step_folder(Path(config.out_dir), config.task.steps)
    products = config.computing.products
    model = checkpoint.load_whole(config.model, folder, weight_dtype(config.precision), products=products)
    if continues:
        say(f"continuation of {samples.prompt!r}:\n{sample_text(config, prepared, model)}")
    if samples.held_out and has_answers:
        answers = answer_held_out(config, prepared, model)
        write_answers(Path(config.out_dir), answers)
        for answer in answers:
            say(str(answer))


def sample_text(config: TrainConfig, prepared: Prepared, model: Transformer) -> str:
    """Returns the prompt, the text that the whole model generates after it, and a summary."""
    tokenizer = prepared.tokenizer
    prompt = tokenizer.prompt(config.samples.prompt)
    limit = config.model.max_position_tokens
    generation = generate(
        model,
        [prompt[:limit]],
        max_new_tokens=config.samples.tokens,
        sampling=Sampling(temperature=config.samples.temperature, seed=config.seed),
        stop=[tokenizer.end_of_sentence_id],
    )
    text = config.samples.prompt + decode_after(
        tokenizer.decode, tokenizer.text_context(prompt), generation.continuations[0].tokens
    )
    return f"{text}\n{generation.statistics.summary()}"


def answer_held_out(config: TrainConfig, prepared: Prepared, model: Transformer) -> list[HeldOutAnswer]:
    """Answers held-out prompts with the whole model, as `samples` says."""
    samples = config.samples
    tokenizer = prepared.tokenizer
    limit = config.model.max_position_tokens
    exchanges = [each for each in _held_out(prepared, samples.held_out) if len(each.prompt) < limit]
    generation = generate(
        model,
        [each.prompt for each in exchanges],
        max_new_tokens=samples.tokens,
        sampling=Sampling(temperature=samples.temperature, seed=config.seed),
        stop=[tokenizer.end_of_sentence_id],
    )
    return [
        HeldOutAnswer(
            prompt=redact(tokenizer.decode(each.prompt)),
            reference=redact(tokenizer.decode(each.reference)),
            answer=redact(tokenizer.decode(_with_end(continued, tokenizer.end_of_sentence_id))),
        )
        for each, continued in zip(exchanges, generation.continuations, strict=True)
    ]


def _with_end(continued: Continuation, end_id: int) -> list[int]:
    return [*continued.tokens, *([end_id] if continued.finish == "stop" else [])]


def _held_out(prepared: Prepared, count: int) -> Iterator[_Exchange]:
    """Yields the first prompt and answer of validation sequences that are spread evenly over all."""
    weights_NL = prepared.validation_values[WEIGHTS]
    for row in np.unique(np.linspace(0, len(weights_NL) - 1, count).astype(int)).tolist():
        is_predicted = np.flatnonzero(weights_NL[row])
        first = int(is_predicted[0])
        # The answer ends where the next position does not predict, or predicts another sample's answer.
        is_last = np.flatnonzero(np.diff(is_predicted, append=weights_NL.shape[1] + 1) > 1)
        last = int(is_predicted[is_last[0]])
        start = first - int(prepared.validation_positions_NL[row, first])
        tokens = prepared.validation_tokens_NL[row].tolist()
        yield _Exchange(tokens[start : first + 1], tokens[first + 1 : last + 2])

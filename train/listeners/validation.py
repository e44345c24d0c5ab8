"""Measures losses of held-out sequences, or answers to held-out problems, and shows samples.

Shape legend: B sequences, T tokens, R ranges of positions, N sequences, L tokens per sequence.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE, Batch, Loader
from data.pack import WEIGHTS, count_token_bytes
from data.shards.open import Prepared
from data.tokenizer import Tokenizer
from infer.config import Sampling
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request, Rollouts, decode_after
from model.objective import MAIN, LossSums, MicroBatch
from model.router import RecordedRoutes
from model.transformer import Transformer
from train.callbacks import call_on_first_rank
from train.checkpoint import load as checkpoint
from train.checkpoint.locate import step_folder
from train.config import TaskConfig, TrainConfig
from train.core.by_source import SourceMeans, SumsBySource, ValidationBySource
from train.core.learner import NetworkComparison
from train.core.replica import BatchReader, Read, Replica
from train.core.step import Losses, is_reported, reduce_losses
from train.core.world import World, weight_dtype
from train.files.json_lines import try_append_event
from train.files.run_files import redact
from train.listeners.listener import Listener, Moment
from train.post.sample import PASS_AT_1
from train.report.viewer import HeldOutAnswer, write_answers
from train.tasks.pretrain import base_length
from train.tasks.registry import TASKS, StepRates, open_task

FIRST_RANGE_TOKENS = 128
LOSS_BY_POSITION = "loss_by_position"
BITS_PER_BYTE = "bits_per_byte"
_POSITIONS = "positions"
_ANSWERED_TOGETHER = 16  # prompts, next to the state of the training
_NO_RATES = StepRates(learning_rate=0.0, mtp_loss_weight=0.0, bias_update=0.0)
_NO_NETWORK = NetworkComparison()


class Validator(Listener):
    """Validates a run."""

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        config = self._parts.config
        wanted = config.validation.sequences if config.rollout is None else config.rollout.held_out
        has_held_out = self._parts.loader.num_validation_sequences > 0
        return wanted > 0 and has_held_out and self._parts.is_due(num_done, config.validation.every_steps)

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        return self.measure(moment.num_done)

    def measure(self, num_done: int) -> Mapping[str, Any]:
        """Measures and reports held-out problems or sequences, and returns the means for the step's record."""
        answers = self._parts.learner.hook.validate()
        values = self._measure_losses(num_done) if answers is None else self._report_answers(num_done, answers)
        return {f"validation_{name}": value for name, value in values.items()}

    def _measure_losses(self, num_done: int) -> Mapping[str, Any]:
        parts = self._parts
        task = parts.config.task
        learner = parts.learner
        num_sequences = parts.config.validation.sequences
        by_position = open_by_position(parts.config, parts.prepared.tokenizer)
        sums = open_by_source(parts.config, parts.prepared, learner.world.device)
        by_source = None if sums is None else ValidationBySource(parts.config, sums)
        means = validate(
            learner.replica, task, parts.loader, num_sequences, learner.comparison, Measures(by_position, by_source)
        )
        unit = TASKS.get(task.kind).unit
        line = f"step {num_done:>5}  validation loss {means.loss:.4f} nats per {unit}"
        if unit == "token":
            bits_per_byte = means.loss / math.log(2) / parts.prepared.bytes_per_token
            entropy = parts.prepared.unigram_entropy_nats
            line += f", {bits_per_byte:.3f} bits per byte  (unigram entropy {entropy:.4f})"
        parts.reporter.say(line + "".join(f"  {name} {mean:.4f}" for name, mean in means.reported.items()))
        self._call(num_done, means.loss)
        self.end_if_reached(num_done, means.loss)
        positions = {} if means.by_position is None else means.by_position.record()
        sources: dict[str, object] = {}
        if means.by_source is not None:
            sources = means.by_source.record()
            parts.reporter.add_loads({"validation_by_source": means.by_source.loads})
        return {"loss": means.loss, **means.reported, **positions, **sources}

    def end_if_reached(self, num_done: int, loss: float) -> None:
        """Ends the run after this step if the loss is at most the target, and says so if it ends without that.

        All ranks have the same loss.
        """
        target, end = self._parts.config.validation.target_loss, self._parts.end
        if target is None:
            return
        if loss <= target:
            end.num_steps = num_done
        if num_done == end.num_steps:
            word = "is reached; the run ends" if loss <= target else "is not reached"
            end.reason = f"validation.target_loss={target:g} {word}"
            self._parts.reporter.say(f"step {num_done:>5}  {end.reason}")
            if self._parts.learner.world.rank == 0:
                try_append_event(Path(self._parts.config.out_dir), "target_loss", num_done, end.reason)

    def _report_answers(self, num_done: int, measured: Mapping[str, float]) -> Mapping[str, float]:
        text = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
        self._parts.reporter.say(f"step {num_done:>5}  held-out problems: {text}")
        self._call(num_done, measured.get(PASS_AT_1, measured.get("reward", math.nan)))
        return measured

    def _call(self, num_done: int, value: float) -> None:
        if on_validation := self._parts.callbacks.on_validation:
            world = self._parts.learner.world
            call_on_first_rank(world, "on_validation", partial(on_validation, num_done, value))


@dataclass(frozen=True, slots=True)
class Validation:
    """Means over held-out sequences: the main loss, the task's others by name, and losses by position."""

    loss: float
    reported: Mapping[str, float]
    by_position: "PositionMeans | None" = None
    by_source: SourceMeans | None = None


@dataclass(frozen=True, slots=True)
class Measures:
    """What a validation measures in addition to means over all tokens."""

    by_position: "LossByPosition | None" = None
    by_source: ValidationBySource | None = None


_NO_MEASURES = Measures()


def validate(
    replica: Replica,
    task: TaskConfig,
    loader: Loader,
    num_sequences: int,
    comparison: NetworkComparison = _NO_NETWORK,
    measures: Measures = _NO_MEASURES,
) -> Validation:
    """Returns the main loss and reported means over at most `num_sequences` sequences. All ranks call it."""
    by_position = measures.by_position
    by_source = measures.by_source
    size = replica.global_sequences
    # A part that is smaller than a global batch is one pass, filled with empty sequences.
    passes = max(min(num_sequences, loader.num_validation_sequences) // size, 1)
    totals = defaultdict[str, float](float)
    counts = defaultdict[str, float](float)
    for index in range(passes):
        read = partial(_read_validation, loader, index * size)
        if by_source is not None:
            by_source.begin(loader.validation_sources(index * size, size))
        losses, denominators = validate_pass(replica, task, read, comparison, measures)
        for name, mean in losses.by_name.items():
            totals[name] += mean * denominators[name]
            counts[name] += denominators[name]
    replica.discard_counts()
    means = {name: total / (counts[name] or 1) for name, total in totals.items()}
    reported = {name: mean for name, mean in means.items() if is_reported(name)}
    return Validation(
        means.get(MAIN, 0.0),
        reported,
        None if by_position is None else by_position.means(replica.world),
        None if by_source is None else by_source.means(replica.world),
    )


def validate_pass(
    replica: Replica,
    config: TaskConfig,
    read: Read,
    comparison: NetworkComparison = _NO_NETWORK,
    measures: Measures = _NO_MEASURES,
) -> tuple[Losses, dict[str, float]]:
    """Returns the losses of a forward pass, without MTP in the total, and each mean's denominator."""
    task = open_task(config, replica.config.model, replica.config.batch)
    by_position = measures.by_position
    by_source = measures.by_source
    log_probs: dict[tuple[int, int], Tensor] | None = None if by_position is None and by_source is None else {}
    routes = None if by_source is None else RecordedRoutes()
    if by_position is not None:
        read = partial(_read_marked, by_position, read)
    batches = BatchReader(replica, task, read)
    sums = LossSums(task.names, log_probs)
    counts = batches.count()
    replica.forward(batches, comparison.add(batches, task.objective(counts, _NO_RATES)), sums, routes)
    if by_position is not None:
        for position, log_probs_BT in (sums.log_probs or {}).items():
            batch = batches(*position)
            assert batch is not None
            by_position.add(batch, log_probs_BT)
    if by_source is not None and routes is not None:
        by_source.add(replica, batches, sums.log_probs or {}, routes.ids)
    losses = reduce_losses(replica, task, sums, counts, _NO_RATES)
    return losses, dict(zip(sums.names, counts.tolist(), strict=True))


def _read_marked(by_position: "LossByPosition", read: Read, first: int, count: int) -> Batch:
    return by_position.mark(read(first, count))


def _read_validation(loader: Loader, offset: int, first: int, count: int) -> Batch:
    return loader.validation_batch(offset + first, count)


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionMeans:
    """Means of validation; a range of positions such as `128-255` without a token is left out.

    `losses` are in nats per token. `bits_per_byte` is of tokens at positions below the base length.
    """

    losses: Mapping[str, float]
    bits_per_byte: float | None

    def record(self) -> dict[str, object]:
        """Returns what a step's record holds; a run with a single range of sequences records no ranges."""
        values: dict[str, object] = {LOSS_BY_POSITION: dict(self.losses)} if len(self.losses) > 1 else {}
        return values if self.bits_per_byte is None else {**values, BITS_PER_BYTE: self.bits_per_byte}


class LossByPosition:
    """Sums of one rank over the micro-batches of a validation.

    A token's position is the number of tokens before it in its document or piece. Ranges end at powers of two.
    """

    def __init__(self, length: int, base: int, tokenizer: Tokenizer, first_range: int = FIRST_RANGE_TOKENS) -> None:
        self._base = base
        self._first_range = first_range
        self._bytes_V = torch.from_numpy(count_token_bytes(tokenizer))
        num_ranges = 1 + max(length - 1, 1).bit_length() - (first_range - 1).bit_length()
        self._sums_2R = torch.zeros(2, max(num_ranges, 1), dtype=torch.float64)
        self._base_sums = torch.zeros(2, dtype=torch.float64)

    @staticmethod
    def mark(batch: Batch) -> Batch:
        """Returns a batch with each token's position as an extra, which is split like the tokens."""
        return replace(batch, extras={**batch.extras, _POSITIONS: batch.positions_BT})

    def add(self, batch: MicroBatch, log_probs_BT: Tensor) -> None:
        """Adds a marked micro-batch, given the log-probabilities of its main targets."""
        targets = batch.targets_BT[0].cpu().flatten()  # host sync
        is_counted = targets != IGNORE
        # The position is that of the target, not of the token that predicts it.
        positions = batch.extras[_POSITIONS].cpu().flatten()[is_counted] + 1
        nats = -log_probs_BT.detach().cpu().double().flatten()[is_counted]
        # The exponent of a power of two is exact: 127 is in range 0, 128 in range 1, 256 in range 2.
        ranges = torch.frexp(positions / self._first_range).exponent.clamp(min=0).long()
        self._sums_2R[0].index_add_(0, ranges, nats)
        self._sums_2R[1].index_add_(0, ranges, torch.ones_like(nats))
        is_near = positions < self._base
        self._base_sums += torch.stack(
            [nats[is_near].sum(), self._bytes_V[targets[is_counted][is_near]].sum().double()]
        )

    def means(self, world: World) -> PositionMeans:
        """Returns the means over all ranks. All ranks call it."""
        summed = world.reduce(torch.cat([self._sums_2R.flatten(), self._base_sums]), "sum of losses by position")
        nats, num_bytes = summed[-2:].tolist()
        nats_R, counts_R = (row.tolist() for row in summed[:-2].view(2, -1))
        pairs = enumerate(zip(nats_R, counts_R, strict=True))
        losses = {self._name(number): total / count for number, (total, count) in pairs if count}
        return PositionMeans(losses=losses, bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None)

    def _name(self, number: int) -> str:
        last = self._first_range << number
        return f"{last // 2 if number else 0}-{last - 1}"


def open_by_position(config: TrainConfig, tokenizer: Tokenizer) -> "LossByPosition | None":
    """Returns what measures a run's validations by position; None if its task does not train on documents."""
    spec = TASKS.get(config.task.kind)
    if spec.values or spec.has_rollouts or config.model.head != "tokens":
        return None
    return LossByPosition(config.batch.sequence_length_tokens, base_length(config), tokenizer)


def open_by_source(config: TrainConfig, prepared: Prepared, device: torch.device) -> SumsBySource | None:
    """Returns what measures a run's losses by source; None without a mixture of documents."""
    if not prepared.is_mixture or open_by_position(config, prepared.tokenizer) is None:
        return None
    return SumsBySource(prepared.order.names, prepared.tokenizer, device)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Token ids of a prompt, and of the answer that the data have."""

    prompt: list[int]
    reference: list[int]


class Samples(Listener):
    """The samples of a finished run. Rank 0 alone loads the whole model from the last checkpoint."""

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        is_over = num_done >= self._parts.end.num_steps
        return is_over and self._parts.learner.world.rank == 0 and self._parts.config.model.head == "tokens"

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        report_samples(self._parts.config, self._parts.prepared, moment.num_done, self._parts.reporter.show)
        return {}


def report_samples(config: TrainConfig, prepared: Prepared, num_done: int, say: Callable[[str], None]) -> None:
    """Generates and reports samples with the run's last checkpoint, which this process alone loads whole."""
    samples = config.samples
    has_answers = WEIGHTS in TASKS.get(config.task.kind).values and len(prepared.validation.tokens_NL) > 0
    # A model of chats continues no plain text; its held-out prompts are chats.
    continues = samples.prompt and config.data.source.chat_template is None
    if not samples.tokens or not (continues or (samples.held_out and has_answers)):
        return
    folder = step_folder(Path(config.out_dir), num_done)
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
    made = _continue(config, prepared, model, [prompt[: config.model.max_position_tokens]])
    tokens = made.rollouts[0].without_end([tokenizer.special.eos])
    text = config.samples.prompt + decode_after(tokenizer.decode, tokenizer.text_context(prompt), tokens)
    return f"{text}\n{made.statistics.summary()}"


def _continue(
    config: TrainConfig, prepared: Prepared, model: Transformer, prompts: Sequence[Sequence[int]]
) -> Rollouts:
    """Continues each prompt once, as `samples` says. A stop token at the end is part of a rollout."""
    request = Request(
        max_new_tokens=config.samples.tokens,
        sampling=Sampling(temperature=config.samples.temperature, seed=config.seed),
        stop=frozenset([prepared.tokenizer.special.eos]),
    )
    numbered = [NumberedPrompt(number=number, tokens=tuple(prompt)) for number, prompt in enumerate(prompts)]
    return LocalEngine(model, batch_size=_ANSWERED_TOGETHER).generate(numbered, request)


def answer_held_out(config: TrainConfig, prepared: Prepared, model: Transformer) -> list[HeldOutAnswer]:
    """Answers held-out prompts with the whole model, as `samples` says."""
    tokenizer = prepared.tokenizer
    limit = config.model.max_position_tokens
    exchanges = [exchange for exchange in _held_out(prepared, config.samples.held_out) if len(exchange.prompt) < limit]
    made = _continue(config, prepared, model, [exchange.prompt for exchange in exchanges])
    return [
        HeldOutAnswer(
            prompt=redact(tokenizer.decode(exchange.prompt)),
            reference=redact(tokenizer.decode(exchange.reference)),
            answer=redact(tokenizer.decode(rollout.tokens)),
        )
        for exchange, rollout in zip(exchanges, made.rollouts, strict=True)
    ]


def _held_out(prepared: Prepared, count: int) -> Iterator[_Exchange]:
    """Yields the first prompt and answer of validation sequences that are spread evenly over all."""
    weights_NL = prepared.validation.values[WEIGHTS]
    for row in np.unique(np.linspace(0, len(weights_NL) - 1, count).astype(int)).tolist():
        is_predicted = np.flatnonzero(weights_NL[row])
        first = int(is_predicted[0])
        # The answer ends where the next position does not predict, or predicts another sample's answer.
        is_last = np.flatnonzero(np.diff(is_predicted, append=weights_NL.shape[1] + 1) > 1)
        last = int(is_predicted[is_last[0]])
        start = first - int(prepared.validation.positions_NL[row, first])
        tokens = prepared.validation.tokens_NL[row].tolist()
        yield _Exchange(tokens[start : first + 1], tokens[first + 1 : last + 2])

"""Validates a run's model: computes the loss of held-out sequences, and generates a sample of text."""

from functools import partial
from pathlib import Path

from data.loader import Batch, Loader
from data.prepare import Prepared
from infer.config import Sampling
from infer.generate import generate
from infer.text import decode_after
from train.checkpoint import load as checkpoint
from train.checkpoint.locate import step_folder
from train.config import TaskConfig, TrainConfig
from train.network import weight_dtype
from train.replica import Replica
from train.step import validate_pass


def validate(replica: Replica, task: TaskConfig, loader: Loader, num_sequences: int) -> float:
    """Returns the main loss over validation sequences in nats per token. All ranks call it.

    Args:
        replica: network to validate.
        task: of the run.
        loader: of the data.
        num_sequences: number of sequences to read, or fewer if the corpus has fewer.
    """
    size = replica.global_sequences
    passes = min(num_sequences, loader.num_validation_sequences) // size
    nats, targets = 0.0, 0.0
    for index in range(passes):
        losses, count = validate_pass(replica, task, partial(_read_validation, loader, index * size))
        nats += losses.main * count
        targets += count
    replica.observers.traffic.take()  # the next step's record must not count this traffic
    replica.observers.clips.take()
    return nats / (targets or 1)


def sample_text(config: TrainConfig, prepared: Prepared) -> str:
    """Returns the prompt, the text that the last checkpoint generates after it, and a summary.

    This process alone loads the whole model.
    """
    tokenizer = prepared.tokenizer
    folder = step_folder(Path(config.out_dir), config.task.steps)
    model = checkpoint.load_whole(config.model, folder, weight_dtype(config.precision))
    prompt = tokenizer.prompt(config.samples.prompt)
    limit = config.model.max_position_tokens
    made = generate(
        model,
        [prompt[:limit]],
        max_new_tokens=config.samples.tokens,
        sampling=Sampling(temperature=config.samples.temperature, seed=config.seed),
        stop=[tokenizer.end_of_sentence_id],
    )
    text = config.samples.prompt + decode_after(
        tokenizer.decode, tokenizer.text_context(prompt), made.continuations[0].tokens
    )
    return f"{text}\n{made.statistics.summary()}"


def _read_validation(loader: Loader, offset: int, first: int, count: int) -> Batch:
    return loader.validation_batch(offset + first, count)

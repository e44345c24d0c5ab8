"""Formats the prediction as lines of text. Sizes are in GB (10^9 bytes)."""

from train.config import TrainConfig
from train.memory.fitted_cut import fitted_config
from train.memory.predict import JobMemory, RankMemory, imbalance_bytes, predict_memory

_GB = 1e9
_COLUMNS = ("rank", "weights", "gradients", "optimizer", "codes", "batch", "activations", "pending W", "transient")


def memory_lines(config: TrainConfig) -> list[str]:
    """Returns a summary line and a table of every pipeline rank's predicted memory.

    Raises:
        ScheduleError: the schedule cannot be built.
        CutError: the model has fewer layers than stages.
    """
    config = fitted_config(config)
    job = predict_memory(config)
    return [summary_line(config, job), *memory_table(job), *_notes(config, job)]


def memory_table(job: JobMemory) -> list[str]:
    """Returns a header and a line for each pipeline rank, with the parts of its memory in GB."""
    header = [*_COLUMNS, "update", "reserve", "total"]
    rows = [header, *([str(rank.pipeline_rank), *(_gb(size) for size in _cells(rank))] for rank in job.ranks)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def summary_line(config: TrainConfig, job: JobMemory) -> str:
    """Returns one line about the rank that needs most memory, with its parts."""
    worst = job.worst
    of = "" if config.cluster.memory_bytes is None else f" of {config.cluster.memory_bytes / _GB:.1f}"
    return f"memory: rank {worst.pipeline_rank} needs {gigabytes(worst.total)}{of} ({parts(worst)})"


def parts(rank: RankMemory) -> str:
    """Returns the parts of a rank's memory that are at least 1 % of it, the largest first.

    They are in GB without a unit, or below 0.1 GB in MB with a unit.
    """
    is_reducing = rank.reducing > rank.passes
    passes = rank.cool_down if is_reducing else rank.pipeline
    named = {
        "activations": passes.activations + passes.pending,
        "weights": rank.weights,
        "gradients": rank.gradients,
        "optimizer": rank.optimizer,
        "FP8 weights": rank.weight_codes,
        "transient": passes.exchange + passes.transfers + passes.inside,
        "batch": rank.batch,
        "reserve": rank.reserve,
        "update": rank.update if is_reducing else 0,
    }
    shown = sorted(((size, name) for name, size in named.items() if size >= 0.01 * rank.total), reverse=True)
    return ", ".join(f"{name} {_part(size)}" for size, name in shown)


def gigabytes(size: int) -> str:
    """Returns a size with its unit: MB below 0.1 GB, or else GB."""
    return f"{size / _GB:.1f} GB" if size >= 0.1 * _GB else f"{size / 1e6:.1f} MB"


def _cells(rank: RankMemory) -> tuple[int, ...]:
    pipeline = rank.pipeline
    transient = pipeline.exchange + pipeline.transfers + pipeline.inside
    static = (rank.weights, rank.gradients, rank.optimizer, rank.weight_codes, rank.batch)
    return (*static, pipeline.activations, pipeline.pending, transient, rank.update, rank.reserve, rank.total)


def _notes(config: TrainConfig, job: JobMemory) -> list[str]:
    lines = [
        "GB; total = weights + gradients + optimizer + the larger of all passes and of the last ones with the update "
        f"+ reserve; {job.num_micro_batches} micro-batches of {config.batch.micro_sequences} sequences",
        "experts are taken to receive equally many rows"
        + (
            f"; 10 % more on the rank that needs most add {gigabytes(imbalance_bytes(config, job))}"
            if config.parallelism.expert > 1
            else ""
        ),
    ]
    if config.schedule.kind == "auto":
        lines.append("schedule=auto is chosen when the run starts; predicted for dualpipe_split")
    return lines


def _gb(size: int) -> str:
    return f"{size / _GB:.1f}" if size >= 0.1 * _GB else f"{size / _GB:.3f}"


def _part(size: int) -> str:
    return f"{size / _GB:.1f}" if size >= 0.1 * _GB else gigabytes(size)

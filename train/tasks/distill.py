"""Registers distillation, and stores a teacher's most probable tokens, which a student imitates.

Torch is imported only to compute scores. A folder holds `scores.json` and, for each part of the samples, token ids and
log-probabilities. Shape legend: N sequences, L tokens per sequence, B sequences of a batch, T tokens, R rows with a
target, K kept tokens.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from base.decode import decode
from base.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from base.refusal import ConfigError
from data.corpus import DataError
from data.pack import WEIGHTS
from data.progress import Progress
from data.registry import Part
from data.shards.open import Prepared, PreparedPart
from model.config import ModelConfig
from train.checkpoint.sources import check_second_network, second_network_run
from train.config import BatchConfig
from train.tasks.registry import TASKS, TaskSpec
from train.tasks.samples import SampleTaskConfig, check_samples

if TYPE_CHECKING:
    from torch import Tensor

    from model.transformer import Transformer
    from train.config import TrainConfig
    from train.tasks.next_token import DistillationTask

SCORES_NAME = "scores.json"
IDS = "teacher_ids"
LOG_PROBS = "teacher_log_probs"
PARTS: tuple[Part, ...] = ("train", "validation")
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoresMeta:
    """What stored scores belong to."""

    format_version: int
    teacher: str
    fingerprint: str
    vocab_size: int
    kept: int
    temperature: float


def is_scores_folder(path: str) -> bool:
    """Returns whether a path is a folder of stored scores rather than weights."""
    return (Path(path).expanduser() / SCORES_NAME).is_file()


def read_meta(path: str, key: str = "task.teacher") -> ScoresMeta:
    """Reads what the scores of a folder belong to."""
    file = Path(path).expanduser() / SCORES_NAME
    try:
        meta = decode(ScoresMeta, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {file} must be the record of stored scores, cannot be read ({error})") from error
    if meta.format_version != FORMAT_VERSION:
        raise ConfigError(f"{key}: {file} must have format_version {FORMAT_VERSION}, has {meta.format_version}")
    return meta


def check_scores(path: str, temperature: float, vocab_size: int) -> None:
    """Rejects stored scores at another temperature or of another vocabulary."""
    meta = read_meta(path)
    if meta.temperature != temperature:
        raise ConfigError(
            f"task.temperature: must be {meta.temperature:g}, at which the scores in {path} were computed, is "
            f"{temperature:g}; nearest valid: {meta.temperature:g}"
        )
    if meta.vocab_size != vocab_size:
        raise ConfigError(
            f"task.teacher: must have the vocabulary of the model, {vocab_size} tokens, {path} has {meta.vocab_size}; "
            f"nearest valid: a teacher with the same tokenizer"
        )


def with_scores(path: str, prepared: Prepared) -> Prepared:
    """Returns samples with stored scores as further values of each token, memory-mapped.

    Raises:
        DataError: the scores belong to other samples, or a file is missing or of another shape.
    """
    meta = read_meta(path)
    folder = Path(path).expanduser()
    if meta.fingerprint != prepared.fingerprint:
        raise DataError(
            f"task.teacher: {path} must have the scores of these samples, whose fingerprint is {prepared.fingerprint}, "
            f"has those of {meta.fingerprint}; nearest valid: python -m launch.score_teacher with the same data and "
            f"batch.sequence_length_tokens"
        )
    parts: dict[Part, PreparedPart] = {}
    for name, part in prepared.parts.items():
        scores = {value: _open(folder, name, value, (*part.tokens_NL.shape, meta.kept)) for value in (IDS, LOG_PROBS)}
        parts[name] = replace(part, values={**part.values, **scores})
    return replace(prepared, train=parts["train"], validation=parts["validation"])


class ScoresWriter:
    """A folder of scores that appears under its name when it is complete."""

    def __init__(self, folder: Path, meta: ScoresMeta) -> None:
        """Creates the folder under a temporary name."""
        self.folder = folder
        self._meta = meta
        self._partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        self._partial.mkdir(parents=True)

    def __enter__(self) -> "ScoresWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Completes the folder, or removes what was written if an error ends the block."""
        if kind is not None:
            shutil.rmtree(self._partial)
            return
        (self._partial / SCORES_NAME).write_text(json.dumps(asdict(self._meta), indent=1) + "\n", encoding="utf-8")
        self._partial.replace(self.folder)

    def arrays(self, part: Part, num_sequences: int, length: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Creates the ids and log-probabilities of a part, [N, L, K], zero and memory-mapped."""
        shape = (num_sequences, length, self._meta.kept)
        return (
            np.lib.format.open_memmap(self._path(part, IDS), mode="w+", dtype=np.int32, shape=shape),
            np.lib.format.open_memmap(self._path(part, LOG_PROBS), mode="w+", dtype=np.float32, shape=shape),
        )

    def _path(self, part: Part, name: str) -> Path:
        return _array_path(self._partial, part, name)


def _array_path(folder: Path, part: Part, name: str) -> Path:
    return folder / f"{part}_{name}_NLK.npy"


def _open(folder: Path, part: Part, name: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    path = _array_path(folder, part, name)
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"task.teacher: {path} must be an array of scores, cannot be read ({error})") from error
    if array.shape != shape:
        raise DataError(f"task.teacher: {path} must have the shape {list(shape)}, has {list(array.shape)}")
    return array


def write_scores(
    model: "Transformer",
    prepared: Prepared,
    meta: ScoresMeta,
    writer: ScoresWriter,
    batch_size: int,
    progress: Progress,
) -> int:
    """Writes the scores of both parts of the samples, and returns the number of targets that were scored."""
    import torch

    from data.loader import IGNORE, Batch
    from kernels.attention.documents import Documents

    device = model.head_weight.device
    num_targets = 0
    for name, part in prepared.parts.items():
        ids_NLK, log_probs_NLK = writer.arrays(name, *part.tokens_NL.shape)
        starts = range(0, len(part.tokens_NL), batch_size)
        for first in progress.over(f"scores of {name}", starts, len(starts), lambda first: 1, "batches"):
            rows = slice(first, first + batch_size)
            batch = Batch(
                tokens_BT=torch.from_numpy(part.tokens_NL[rows].astype(np.int64)),
                positions_BT=torch.from_numpy(part.positions_NL[rows].astype(np.int64)),
                pad_id=prepared.tokenizer.special.pad,
            )
            is_target_BT = (batch.targets(1) != IGNORE) & torch.from_numpy(part.values[WEIGHTS][rows] != 0)
            documents = Documents.from_positions(batch.positions_BT).to(device)
            with torch.no_grad():
                states_BTD = model.final_states(batch.tokens_BT.to(device), documents)
            ids_RK, log_probs_RK = _top(states_BTD[is_target_BT.to(device)], model.head_weight.detach(), meta)
            ids_NLK[rows][is_target_BT.numpy()] = ids_RK.int().cpu().numpy()
            log_probs_NLK[rows][is_target_BT.numpy()] = log_probs_RK.float().cpu().numpy()
            num_targets += len(ids_RK)
    return num_targets


def _top(states_RD: "Tensor", head_VD: "Tensor", meta: ScoresMeta) -> "tuple[Tensor, Tensor]":
    """Returns the most probable tokens of each row and their log-probabilities, chunk by chunk."""
    import torch

    from kernels.cross_entropy.reference import chunk_rows

    wide = torch.promote_types(states_RD.dtype, torch.float32)
    ids_RK = torch.empty(len(states_RD), meta.kept, dtype=torch.int64, device=states_RD.device)
    log_probs_RK = torch.empty(len(states_RD), meta.kept, dtype=wide, device=states_RD.device)
    size = max(1, chunk_rows(len(states_RD), len(head_VD), states_RD.dtype))
    for first in range(0, len(states_RD), size):
        chunk = slice(first, first + size)
        logits_CV = (states_RD[chunk] @ head_VD.t()).to(wide) / meta.temperature
        top = logits_CV.log_softmax(-1).topk(meta.kept, -1)
        ids_RK[chunk] = top.indices
        log_probs_RK[chunk] = top.values
    return ids_RK, log_probs_RK


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(SampleTaskConfig):
    """The configuration of distillation.

    `teacher` is a folder that `launch.score_teacher` wrote, or weights, which form a second, frozen network.
    `beta` is the teacher's weight in jensen_shannon. The divergence has what `cross_entropy_weight` leaves.
    `student_share` is the probability that an answer is the student's if `answers` is `student`.
    """

    teacher: str
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"]
    beta: Share
    temperature: PositiveFloat
    cross_entropy_weight: Share
    answers: Literal["data", "student"]
    student_share: Share
    max_new_tokens: PositiveInt
    sampling_temperature: NonNegativeFloat


def build_distill(config: DistillConfig, model: ModelConfig, batch: BatchConfig) -> "DistillationTask":
    """Builds the task of distillation."""
    from train.tasks.next_token import DistillationTask

    return DistillationTask(config, model.mtp_depth, masks_documents=batch.document_mask)


def check_distill(config: "TrainConfig") -> None:
    """Rejects data without samples, a mixture of one distribution, and sampling that cannot be trained on."""
    check_samples(config)
    assert isinstance(config.task, DistillConfig)
    beta = config.task.beta
    if config.task.divergence == "jensen_shannon" and not 0 < beta < 1:
        raise ConfigError(
            f"task.beta: must be above 0 and below 1 with task.divergence=jensen_shannon, is {beta:g}; nearest valid: "
            f"task.divergence={'forward_kl' if beta <= 0 else 'reverse_kl'}, which is its limit"
        )
    if config.task.answers == "student":
        _check_sampling(config.task, config.batch.sequence_length_tokens)


def _check_sampling(task: DistillConfig, length: int) -> None:
    if task.student_share == 0:
        raise ConfigError(
            "task.student_share: must be above 0 with task.answers=student, is 0; nearest valid: task.answers=data"
        )
    if task.cross_entropy_weight > 0:
        raise ConfigError(
            f"task.cross_entropy_weight: must be 0 with task.answers=student, because the student's own tokens are no "
            f"answer of the data, is {task.cross_entropy_weight:g}; nearest valid: 0"
        )
    if task.max_new_tokens >= length:
        raise ConfigError(
            f"task.max_new_tokens: must be below batch.sequence_length_tokens={length}, which also holds the prompt, "
            f"is {task.max_new_tokens}; nearest valid: {length - 1}"
        )


def check_teacher(config: "TrainConfig") -> None:
    """Rejects a teacher that is neither stored scores nor weights, or has another vocabulary."""
    task = config.task
    assert isinstance(task, DistillConfig)
    if is_scores_folder(task.teacher):
        if task.answers == "student":
            raise ConfigError(
                f"task.answers: must be data if task.teacher is a folder of stored scores, which belong to the answers "
                f"of the data, is student; nearest valid: data, or weights as task.teacher instead of {task.teacher}"
            )
        check_scores(task.teacher, task.temperature, config.model.vocab_size)
        return
    check_second_network(config, task.teacher, "task.teacher", "a teacher")


def teacher_run(config: "TrainConfig") -> "TrainConfig | None":
    """Returns the run with the architecture of a teacher in its pipeline; None if scores are stored."""
    assert isinstance(config.task, DistillConfig)
    if is_scores_folder(config.task.teacher):
        return None
    return second_network_run(config, config.task.teacher, "task.teacher")


def add_scores(config: "TrainConfig", prepared: "Prepared") -> "Prepared":
    """Returns the samples with the teacher's scores, if those are stored."""
    assert isinstance(config.task, DistillConfig)
    return with_scores(config.task.teacher, prepared) if is_scores_folder(config.task.teacher) else prepared


TASKS.register(
    "distill",
    TaskSpec(
        summary="imitation of a teacher's distributions of the answers in samples",
        config=DistillConfig,
        build=build_distill,
        example={
            "epochs": None,
            "teacher": "scores",
            "divergence": "forward_kl",
            "beta": 0.5,
            "temperature": 2.0,
            "cross_entropy_weight": 0.25,
            "answers": "data",
            "student_share": 1.0,
            "max_new_tokens": 16,
            "sampling_temperature": 1.0,
        },
        needs_weights=True,
        check=check_distill,
        check_files=check_teacher,
        teacher_run=teacher_run,
        extend=add_scores,
        values=(WEIGHTS,),
    ),
)

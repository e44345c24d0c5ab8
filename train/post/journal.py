"""Writes and reads the journal of rollouts: all answers and rewards of a step.

It is complete before the step's update. A resumed run reuses a whole journal, so that no answer is sampled again and no
reward is computed again. Files of one step are JSON lines that people can read, and safetensors for log-probabilities.
The last line holds digests of both, so that a file that was torn anywhere is noticed.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from base.files import replace_file
from infer.protocol import Group, Sample
from score.reward import ScoreSheet
from score.score import Problem, Score
from train.post.sample import RolloutHeader, ScoredRollout

FORMAT = 1
FOLDER_NAME = "rollouts"
LOG_PROBS = "log_probs"
_OLD = "old_log_probs"
LENGTHS = "lengths"
_KEPT = "kept_ids"
_NUM_KEPT = "num_kept"
_HEADER = ("rollout", "step", "weights", "settings", "next_prompt", "seconds", "counts")
_LARGEST_FILE_BYTES = 2**34


class JournalError(ValueError):
    """A journal that is missing, torn or of another form. The message says which."""


def journal_path(out_dir: Path, step: int) -> Path:
    """Returns the file with the rollout that first trains in `step`, counted from 1."""
    return out_dir / FOLDER_NAME / f"step-{step:08}.jsonl"


def write_journal(out_dir: Path, rollout: ScoredRollout, dtype: type[np.floating[Any]]) -> Path:
    """Writes a rollout. When this returns, it is whole and on the disk."""
    path = journal_path(out_dir, rollout.header.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = save_tensors(_tensors(rollout.answers, dtype))
    lines = [json.dumps({"format": FORMAT, **asdict(rollout.header)})]
    lines += [json.dumps(_to_plain(number, group)) for number, group in enumerate(rollout.groups)]
    body = "".join(f"{line}\n" for line in lines).encode()
    end = {"end": True, "sha256": _digest(body), "tensors_sha256": _digest(tensors)}
    replace_file(path.with_suffix(".safetensors"), tensors)
    replace_file(path, body + json.dumps(end).encode() + b"\n")
    return path


def read_journal(out_dir: Path, step: int) -> ScoredRollout:
    """Reads a whole rollout.

    Raises:
        JournalError: the file is missing, torn or of another form.
    """
    path = journal_path(out_dir, step)
    try:
        body, end = _split_end(_read_bytes(path))
        tensors = _read_bytes(path.with_suffix(".safetensors"))
        if end.get("sha256") != _digest(body) or end.get("tensors_sha256") != _digest(tensors):
            raise JournalError(f"{path}: its digests do not match, so it was not written to its end or was changed")
        header, *groups = [json.loads(line) for line in body.splitlines()]
        if header["format"] != FORMAT:
            raise JournalError(f"{path}: must have format {FORMAT}, has {header['format']}")
        values = iter(_answer_values(load_tensors(tensors)))
        return ScoredRollout(
            header=RolloutHeader(**{name: header[name] for name in _HEADER}),
            groups=tuple(_to_group(group, values) for group in groups),
        )
    except JournalError:
        raise
    except Exception as error:
        raise JournalError(f"{path}: cannot be read: {error}") from error


def read_header(path: Path) -> Mapping[str, Any] | None:
    """Returns the first line of a journal, or None if it is not one."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(2**20))
    except (OSError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) and header.get("format") == FORMAT else None


def remove_after(out_dir: Path, step: int) -> list[Path]:
    """Removes the journals of steps after `step`, counted from 1, and returns their paths."""
    paths = sorted((out_dir / FOLDER_NAME).glob("step-*"))
    late = [path for path in paths if path.name[5:13].isdecimal() and int(path.name[5:13]) > step]
    for path in late:
        path.unlink()
    return late


def _tensors(answers: Sequence[Sample], dtype: type[np.floating[Any]]) -> dict[str, NDArray[Any]]:
    lengths = np.asarray([len(answer.tokens) for answer in answers], dtype=np.int64)
    tensors: dict[str, NDArray[Any]] = {LENGTHS: lengths}
    tensors[LOG_PROBS] = np.asarray([value for answer in answers for value in answer.log_probs], dtype=dtype)
    if any(answer.old_log_probs is not None for answer in answers):
        old = [value for answer in answers for value in answer.old_log_probs or (math.nan,) * len(answer.tokens)]
        tensors[_OLD] = np.asarray(old, dtype=dtype)
    if sets := [kept_set for answer in answers for kept_set in answer.kept]:
        tensors[_NUM_KEPT] = np.asarray([len(kept_set) for kept_set in sets], dtype=np.int64)
        tensors[_KEPT] = np.asarray([token for kept_set in sets for token in kept_set], dtype=np.int32)
    return tensors


def _answer_values(tensors: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Yields the values of each answer's tokens by name: log-probabilities, and kept tokens."""
    ends = [0, *np.cumsum(tensors[LENGTHS]).tolist()]
    sets = _split(tensors[_KEPT], tensors[_NUM_KEPT]) if _KEPT in tensors else []
    for first, last in pairwise(ends):
        values: dict[str, tuple[Any, ...]] = {
            name: tuple(tensors[name][first:last].tolist())
            for name in (LOG_PROBS, _OLD)
            if name in tensors and not np.isnan(tensors[name][first:last]).any()
        }
        yield values | {_KEPT: tuple(sets[first:last])}


def _split(values: NDArray[Any], counts: NDArray[Any]) -> list[tuple[int, ...]]:
    ends = [0, *np.cumsum(counts).tolist()]
    return [tuple(values[first:last].tolist()) for first, last in pairwise(ends)]


def _to_plain(number: int, group: Group) -> dict[str, Any]:
    return {
        "group": number,
        "prompt": group.number,
        "problem": group.key,
        "text": group.problem.prompt,
        "answer": group.problem.answer,
        "domain": group.problem.domain,
        "tokens": group.tokens,
        "dropped": group.dropped,
        "samples": [
            {
                "sample": answer.sample,
                "tokens": answer.tokens,
                "text": answer.text,
                "finish": answer.finish,
                "outcome": answer.sheet.outcome,
                "total": answer.sheet.total,
                "parts": {
                    kind: {"value": score.value, "outcome": score.outcome, "detail": score.detail}
                    for kind, score in answer.sheet.parts.items()
                },
                "reward": answer.reward,
                "advantage": answer.advantage,
                "version": answer.version,
            }
            for answer in group.answers
        ],
    }


def _to_group(values: Mapping[str, Any], found: Iterator[dict[str, tuple[Any, ...]]]) -> Group:
    return Group(
        number=values["prompt"],
        key=values["problem"],
        problem=Problem(prompt=values["text"], answer=values["answer"], domain=values.get("domain")),
        tokens=tuple(values["tokens"]),
        dropped=values["dropped"],
        answers=tuple(_to_answer(values["prompt"], sample, next(found)) for sample in values["samples"]),
    )


def _to_answer(prompt: int, values: Mapping[str, Any], found: Mapping[str, tuple[Any, ...]]) -> Sample:
    parts = {kind: Score(**score) for kind, score in values["parts"].items()}
    return Sample(
        prompt=prompt,
        sample=values["sample"],
        tokens=tuple(values["tokens"]),
        log_probs=found[LOG_PROBS],
        finish=values["finish"],
        kept=found[_KEPT],
        text=values["text"],
        sheet=ScoreSheet(total=values["total"], outcome=values["outcome"], parts=parts),
        reward=values["reward"],
        advantage=values["advantage"],
        version=values["version"],
        old_log_probs=found.get(_OLD),
    )


def _split_end(content: bytes) -> tuple[bytes, Mapping[str, Any]]:
    cut = content.rfind(b"\n", 0, -1) + 1
    end = json.loads(content[cut:]) if content.endswith(b"\n") else {}
    return content[:cut], end if isinstance(end, dict) and end.get("end") is True else {}


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_FILE_BYTES:
        raise JournalError(f"{path}: must have at most {_LARGEST_FILE_BYTES} bytes")
    return path.read_bytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

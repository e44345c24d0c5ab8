"""Journals of rollouts: whole ones are read as they were written, and all others are noticed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infer.protocol import Sample
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import Problem, Score
from tests.rollouts import answer_of, group_of, header_of
from train.post.journal import (
    JournalError,
    journal_path,
    read_header,
    read_journal,
    remove_after,
    write_journal,
)
from train.post.sample import ScoredRollout


def made_rollout(step: int = 3, *, with_old: bool = False) -> ScoredRollout:
    """Returns a rollout of two groups, with text that JSON must escape."""

    def answer(prompt: int, sample: int, length: int) -> Sample:
        values = tuple(float(np.float32(-0.1 * at - sample)) for at in range(length))
        sheet = ScoreSheet(
            total=0.1, outcome="wrong", parts={"exact": Score(value=0.1, outcome="wrong", detail="\n\x00")}
        )
        return answer_of(
            sample,
            tuple(range(length)),
            prompt=prompt,
            log_probs=values,
            text='</script>\u2028\n"',
            sheet=sheet,
            reward=0.1,
            advantage=-1 / 3,
            version=2,
            old_log_probs=values if with_old and sample else None,
        )

    groups = tuple(
        group_of(
            *(answer(number, sample, length) for sample, length in enumerate((3, 0, 4))),
            number=number,
            key=f"key-{number}",
            problem=Problem(prompt="4321=", answer=None if number else "1234"),
            tokens=(5, 6),
            dropped="" if number else "equal rewards",
        )
        for number in range(2)
    )
    header = header_of(step, seconds={"sampling": 0.5}, counts={"groups": 2})
    return ScoredRollout(header=header, groups=groups)


@pytest.mark.parametrize("with_old", [False, True])
def test_journal_is_read_as_it_was_written(tmp_path: Path, *, with_old: bool) -> None:
    rollout = made_rollout(with_old=with_old)
    path = write_journal(tmp_path, rollout, np.float32)
    found = read_journal(tmp_path, 3)
    # An answer without tokens has no log-probabilities to tell whether they were computed.
    expected = replace(
        rollout,
        groups=tuple(
            replace(
                group,
                answers=tuple(
                    replace(each, old_log_probs=() if with_old and not each.tokens else each.old_log_probs)
                    for each in group.answers
                ),
            )
            for group in rollout.groups
        ),
    )
    assert found == expected
    assert sorted(each.name for each in path.parent.iterdir()) == ["step-00000003.jsonl", "step-00000003.safetensors"]
    header = read_header(path)
    assert header is not None
    assert header["next_prompt"] == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".safetensors"])
def test_journal_torn_or_changed_at_any_byte_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = write_journal(tmp_path, made_rollout(), np.float64).with_suffix(suffix)
    whole = path.read_bytes()
    lines = [at for at, byte in enumerate(whole) if byte == 10]
    for cut in {*range(0, len(whole), 61), *lines, *(at + 1 for at in lines[:-1]), len(whole) - 1}:
        path.write_bytes(whole[:cut])
        with pytest.raises(JournalError, match=str(path.with_suffix(".jsonl"))):
            read_journal(tmp_path, 3)
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(JournalError):
            read_journal(tmp_path, 3)
    path.write_bytes(whole)
    assert read_journal(tmp_path, 3) == made_rollout()


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"[]\n", b"{}\n{}\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b'{"format":1}\n', b'{"end":true}\n'],
    ids=range(8),
)
def test_journal_of_another_form_is_noticed(tmp_path: Path, content: bytes) -> None:
    path = write_journal(tmp_path, made_rollout(), np.float32)
    path.write_bytes(content)
    with pytest.raises(JournalError):
        read_journal(tmp_path, 3)
    header = read_header(path)
    assert header is None or "next_prompt" not in header


def test_journals_after_a_step_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_journal(tmp_path, made_rollout(step), np.float32)
    kept = tmp_path / "rollouts" / "notes.txt"
    kept.write_text("mine")
    assert len(remove_after(tmp_path, 2)) == 4
    assert read_journal(tmp_path, 2).header.step == 2
    with pytest.raises(JournalError):
        read_journal(tmp_path, 3)
    assert kept.exists()
    assert not journal_path(tmp_path, 4).exists()


def test_journal_has_readable_lines(tmp_path: Path) -> None:
    path = write_journal(tmp_path, made_rollout(), np.float32)
    header, first, _, end = [json.loads(line) for line in path.read_text().splitlines()]
    assert (header["format"], header["step"], end["end"]) == (1, 3, True)
    assert first["samples"][0]["parts"]["exact"]["detail"] == "\n\x00"

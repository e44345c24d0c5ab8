"""Makes folders of runs with rollouts, as far as the viewer reads them."""

from pathlib import Path

import numpy as np

from data.arithmetic import arithmetic_tokenizer
from infer.protocol import Group, Sample
from score.reward import ScoreSheet
from score.score import Problem, Score
from train.post.journal import write_journal
from train.post.sample import RolloutHeader, ScoredRollout

END = arithmetic_tokenizer().special.eos


def answer_of(sample: int, text: str, log_probs: tuple[float, ...] | None = None) -> Sample:
    """An answer of digits; every other one is right."""
    tokens = (*arithmetic_tokenizer().encode(text), END)
    score = Score(value=float(sample % 2), outcome="correct" if sample % 2 else "wrong", detail=text)
    return Sample(
        prompt=0,
        sample=sample,
        tokens=tokens,
        log_probs=log_probs or tuple(-(sample + place / 8) for place in range(len(tokens))),
        text=text,
        finish="stop",
        sheet=ScoreSheet(total=score.value, outcome=score.outcome, parts={"exact": score}),
        reward=score.value,
        advantage=1.0 if sample % 2 else -1.0,
    )


def place_rollouts(folder: Path, steps: range, groups: int = 2, answers: int = 2, digits: int = 3) -> None:
    """Writes journals and the tokenizer of a checkpoint."""
    for number, step in enumerate(steps):
        made = tuple(
            Group(
                number=number * groups + group,
                key=f"{step}{group}=",
                problem=Problem(prompt=f"{step}{group}=", answer="1"),
                tokens=(0,),
                answers=tuple(answer_of(sample, str(step % 10) * digits) for sample in range(answers)),
            )
            for group in range(groups)
        )
        counts = {"groups": groups, "equal_groups": 0, "groups_without_verdict": 0, "draws": 1}
        header = RolloutHeader(
            rollout=number, step=step, weights="w", settings="s", next_prompt=0, seconds={}, counts=counts
        )
        write_journal(folder, ScoredRollout(header=header, groups=made), np.float32)
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    arithmetic_tokenizer().save(checkpoint / "tokenizer.json")

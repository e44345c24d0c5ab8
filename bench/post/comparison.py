"""Trains a judge that compares an answer with the expected one, and measures how often it agrees with the rule.

The judge writes both answers digit by digit, with a mark of each pair, and ends with 1 or 0: `33=12?55=` and 0. It is a
part `kind: judge` of a reward. Its question contains the expected answer.
"""

import json
from itertools import islice
from pathlib import Path

from bench.post.recipes import LoadedRun, train_recipe
from data.arithmetic import Domain, arithmetic_tokenizer, draws, problem_stream, problems, wrong_answer
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import fill_fields
from evaluation.judge import Judge
from infer.engines.local import LocalEngine
from infer.protocol import Group, Sample
from score.score import Problem
from score.scorers import JudgeConfig

LEAST_AGREEMENT = 0.95
DOMAINS: tuple[Domain, ...] = ("sort", "reverse")
STEPS, TRAINING_LINES = 450, 10_000
HELD_OUT_PROBLEMS, HELD_OUT_SEED = 500, 2_000
CONFIG = JudgeConfig(
    kind="judge",
    weight=1,
    weights="policy",
    form="single",
    samples=1,
    constitution="",
    constitution_path=None,
    question="{prompt}\n{expected}\n{answer}",
    mark="\n",
    accept="1",
    reject="0",
    thinking=False,
    max_new_tokens=32,
    temperature=0.0,
)


def question_of(prompt: str, expected: str, answer: str) -> str:
    """Returns what the judge reads."""
    return fill_fields(CONFIG.question, prompt=prompt, expected=expected, answer=answer)


def write_verdicts(path: Path, seed: int) -> None:
    """Writes questions with a critique and a verdict as chats; half of the answers have wrong digits."""
    numbers = draws(seed)
    with path.open("w", encoding="utf-8") as file:
        for problem in islice(problem_stream(seed, 8, domains=DOMAINS), TRAINING_LINES):
            answer = problem.answer
            # Of one wrong digit alone, the judge would copy the expected answer for both.
            for _ in range(next(numbers) % 2 * (1 + next(numbers) % 8)):
                answer = wrong_answer(answer, next(numbers))
            marks = (f"{a}{b}{'=' if a == b else '?'}" for a, b in zip(problem.answer, answer, strict=True))
            verdict = CONFIG.accept if answer == problem.answer else CONFIG.reject
            line = {
                "prompt": question_of(problem.prompt, problem.answer, answer),
                "answer": f"{''.join(marks)}{CONFIG.mark}{verdict}",
            }
            file.write(json.dumps(line) + "\n")


def measure_agreement(run: LoadedRun) -> tuple[float, float]:
    """Returns the shares of answers that the judge judges, and whose verdict is that of the rule.

    It judges a right and a wrong answer to each of the held-out problems.
    """
    numbers = draws(HELD_OUT_SEED)
    groups = []
    for number, problem in enumerate(problems(HELD_OUT_SEED, HELD_OUT_PROBLEMS, domains=DOMAINS)):
        texts = (problem.answer, wrong_answer(problem.answer, next(numbers)))
        answers = tuple(
            Sample(prompt=number, sample=sample, tokens=(), log_probs=(), finish="stop", text=text)
            for sample, text in enumerate(texts)
        )
        shown = Problem(prompt=problem.prompt, answer=problem.answer)
        groups.append(Group(number=number, tokens=(), key=problem.prompt, problem=shown, answers=answers))
    judge = Judge(CONFIG, CHAT_TEMPLATES.get("v3"), run.tokenizer, "", 100)
    asked = judge.prompts(groups, range(len(groups)))
    request = judge.request(0, 0, frozenset([run.tokenizer.special.eos]))
    engine = LocalEngine(run.model, batch_size=200)
    critiques = engine.generate([each.prompt for each in asked], request).rollouts
    scores = [score for group in judge.scores(groups, asked, critiques) for score in group]
    is_judged = [score.outcome == "rated" for score in scores]
    agrees = [
        judged and score.value == (number % 2 == 0)
        for number, (judged, score) in enumerate(zip(is_judged, scores, strict=True))
    ]
    return sum(is_judged) / len(scores), sum(agrees) / len(scores)


def check_comparison(folder: Path, seed: int) -> list[str]:
    """Trains the judge, prints how often it agrees with the rule, and returns what it lacks."""
    arithmetic_tokenizer().save(folder / "tokenizer.json")
    write_verdicts(folder / "verdicts.jsonl", seed)
    trained = train_recipe(
        "arithmetic_sft",
        folder,
        "parallelism=one_rank",
        "optim/schedule=linear",
        "data=chat",
        "batch.sequence_length_tokens=256",  # four questions with their critiques
        "validation.sequences=0",
        f"task.steps={STEPS}",
        f"seed={seed}",
        f"data.paths=[{folder / 'verdicts.jsonl'}]",
        f"data.tokenizer={folder / 'tokenizer.json'}",
        f"data.cache_dir={folder / 'cache'}",
    )
    judged, found = measure_agreement(LoadedRun.of(trained))
    print(
        f"seed {seed}: {100 * found:.1f} % of 1,000 answers to {HELD_OUT_PROBLEMS} held-out problems have the rule's "
        f"verdict, {100 * judged:.1f} % have a verdict"
    )
    return [] if found >= LEAST_AGREEMENT else [f"agreement must be at least {LEAST_AGREEMENT}, is {found:.3f}"]

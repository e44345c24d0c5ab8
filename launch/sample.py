"""Samples answers to problems, scores them, and writes those to train on: `python -m launch.sample`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from base.decode import decode, encode
from base.ranges import NonNegativeInt, PositiveInt
from base.refusal import ConfigError
from data.arithmetic import Domain, check_domains
from data.arithmetic import problems as arithmetic_problems
from data.chat.encode import encode_prompt
from data.chat.messages import ChatMessage, assistant
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate
from data.problems import ProblemRecord, read_problem
from data.special_tokens import THINK
from data.tokenizer import Tokenizer
from evaluation.judge import Judge, check_critiques
from evaluation.protocol import checked_file, read_lines
from infer.config import Sampling, Speculative, check
from infer.protocol import Engine, Group, NumberedPrompt, Request, Sample
from launch.cli.entry import command, open_output, preview_of
from launch.config.compose import compose, system_errors
from launch.weights.job import Device, WeightsSource, find_template, find_weights, load_model
from launch.weights.scored_samples import (
    JOURNAL_SUFFIX,
    KeepConfig,
    SampleJournal,
    SampleSelection,
    ScoredSample,
    faults,
    select,
    summary,
)
from score.reward import Reward, RewardConfig, check_problems, check_reward, combine, host_parts, score_judged
from score.score import SCORERS, problem_of
from score.scorers import JudgeConfig, RewardModelScorerConfig, read_constitution
from train.checkpoint.index import WeightsKind
from train.checkpoint.manifest import read_step
from train.checkpoint.sources import JUDGE_KEY, REWARD_MODEL_KEY, check_same_tokenizer, judge_model, rating_model

if TYPE_CHECKING:
    from train.post.score import ModelPart

_SYSTEM_SUFFIXES = (".txt", ".md")  # of files with a system prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class FileProblemsConfig:
    """Problems of a file of JSON lines with `prompt` and `answer`, or `prompt` and `tests`."""

    kind: Literal["file"]
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticProblemsConfig:
    """Generated problems: sort or reverse the digits of a number. `conf/problems/` explains the keys."""

    kind: Literal["arithmetic"]
    count: PositiveInt
    domains: tuple[Domain, ...]
    num_digits: PositiveInt
    part: Literal["train", "held_out"]
    generator_seed: NonNegativeInt


ProblemsConfig = FileProblemsConfig | ArithmeticProblemsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCommandConfig:
    """Configuration of rejection sampling. `conf/sample.yaml` explains the keys."""

    ckpt: str
    weights: WeightsKind
    problems: ProblemsConfig
    out: str
    chat: str
    system: tuple[str, ...]
    thinking: bool | None
    num_samples: PositiveInt
    max_new_tokens: PositiveInt
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    seed: int
    reward: RewardConfig
    keep: KeepConfig
    speculative: Speculative
    batch_size: PositiveInt
    dtype: Literal["auto", "float32", "bf16"]
    device: Device
    plugins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingJob:
    """What is sampled: weights that are not read yet, problems, and prompts as token ids."""

    source: WeightsSource
    tokenizer: Tokenizer
    template: ChatTemplate
    thinking: bool
    problems: list[ProblemRecord]
    prompts: list[NumberedPrompt]
    request: Request
    models: dict[str, WeightsSource]  # that score the answers, by the name of their part of the reward
    system: list[str]  # system prompts, which problems take in turn
    originals: list[ChatMessage]  # an answer to each problem, not sampled; empty if none are written


def main(overrides: Sequence[str]) -> int:
    """Samples, scores and selects answers. All user errors are reported before weights are read.

    Every sample is written to `out` with the suffix `.samples` at once, and a command that was interrupted continues
    there. The selected samples are written to `out` at the end. A summary goes to standard output.
    """
    config = _read(overrides)
    with system_errors():
        job = _prepare(config)
        made_with = _made_with(config, job)
        path = Path(config.out).expanduser()
        with SampleJournal(path.with_name(path.name + JOURNAL_SUFFIX), made_with) as journal:
            left = [prompt for prompt in job.prompts if prompt.number not in journal.samples]
            if left:
                host = host_parts(config.reward)
                with nullcontext() if host is None else Reward(host) as reward:
                    _sample(config, job, left, journal, reward, made_with)
            selection = select(journal.samples, config.keep, job.template, thinking=job.thinking)
            with open_output(config.out) as file:
                for record in _records(config.keep, job, journal.samples, selection, made_with):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(summary(journal.samples, selection, config.keep.easy_rate), flush=True)
    warning = faults(journal.samples)
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return 0


def _read(overrides: Sequence[str]) -> SampleCommandConfig:
    config = decode(SampleCommandConfig, compose("sample", overrides))
    has_verdict = any(SCORERS.get(part.kind).has_verdict for part in config.reward.parts)
    if not has_verdict and config.keep.min_reward is None:
        raise ConfigError(
            "keep.min_reward: a value is needed if no part of the reward has a verdict (exact, maths, code), is null; "
            "nearest valid: 0.9"
        )
    if not config.keep.system and not config.system:
        raise ConfigError.broken("keep.system", "must be true without system, which it leaves out", "false", "true")
    return config


def _prepare(config: SampleCommandConfig) -> SamplingJob:
    """Reads problems and encodes prompts, and checks everything that needs no weights."""
    source = find_weights(config.ckpt, config.weights, drop_mtp=config.speculative is False, needs_tokenizer=True)
    tokenizer = source.needed_tokenizer("problems")
    template = find_template(config.chat, source.folder, tokenizer, thinking=config.thinking)
    thinking = template.thinks if config.thinking is None else config.thinking
    if (host := host_parts(config.reward)) is not None:
        check_reward(host)
    models = _find_models(config.reward, source, template, tokenizer)
    problems = load_problems(config.problems)
    _check_fields(config.reward, problems)
    system = [_read_system(value, f"system.{at}") for at, value in enumerate(config.system)]
    prompts = [(*_system_messages(system, at), *problem.messages) for at, problem in enumerate(problems)]
    tokens = [tuple(encode_prompt(prompt, template, tokenizer, thinking=thinking)) for prompt in prompts]
    names = [field.name for field in fields(Sampling) if hasattr(config, field.name)]
    sampling = Sampling(**{name: getattr(config, name) for name in names})
    check(source.model, tokens, config.max_new_tokens, config.speculative, config.batch_size)
    return SamplingJob(
        source=source,
        tokenizer=tokenizer,
        template=template,
        thinking=thinking,
        problems=problems,
        prompts=[NumberedPrompt(number=at, tokens=prompt) for at, prompt in enumerate(tokens)],
        request=Request(
            samples=config.num_samples,
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            stop=frozenset(source.end_ids),
        ),
        models=models,
        system=system,
        originals=[original_answer(problem, thinking=thinking) for problem in problems]
        if config.keep.originals
        else [],
    )


def _find_models(
    reward: RewardConfig, policy: WeightsSource, template: ChatTemplate, tokenizer: Tokenizer
) -> dict[str, WeightsSource]:
    """Locates the weights of judges and reward models, and rejects those that cannot score the answers."""
    models = {}
    for name, part in reward.named_parts.items():
        match part:
            case JudgeConfig(ckpt=None):
                if part.weights == "reference":
                    rule = "must be policy or a folder, because this command has no reference"
                    raise ConfigError.broken(JUDGE_KEY, rule, part.weights, "policy")
                key, models[name] = JUDGE_KEY, policy
            case JudgeConfig(ckpt=str(ckpt)):
                judge_model(ckpt)
                key, models[name] = JUDGE_KEY, _find_scoring(ckpt)
            case RewardModelScorerConfig(ckpt=ckpt):
                rating_model(ckpt)
                key, models[name] = REWARD_MODEL_KEY, _find_scoring(ckpt)
            case _:
                continue
        check_same_tokenizer(models[name].ckpt, key, tokenizer, "a model that was trained from the weights of ckpt")
        if isinstance(part, JudgeConfig):
            read_constitution(part)
            check_critiques(part, models[name].model.max_position_tokens, template)
    return models


def _find_scoring(ckpt: str) -> WeightsSource:
    return find_weights(ckpt, "trained", drop_mtp=True, needs_tokenizer=True).without_mtp()


def _read_system(value: str, key: str) -> str:
    """Returns a system prompt, given its text or the path of a file."""
    is_file = value.endswith(_SYSTEM_SUFFIXES) and len(value.split()) == 1
    text = checked_file(key, value).read_text("utf-8") if is_file else value
    if not text.strip():
        raise ConfigError.broken(key, "must have text", repr(text), "a text, or the path of a .txt or .md file")
    return text.strip()


def _system_messages(system: Sequence[str], number: int) -> tuple[ChatMessage, ...]:
    return (ChatMessage(role="system", content=system[number % len(system)]),) if system else ()


def original_answer(problem: ProblemRecord, *, thinking: bool) -> ChatMessage:
    """Returns the answer that came with a problem as a message.

    Its thoughts are empty if the prompt of the samples begins thoughts (`thinking`).
    """
    answer = problem.answer if problem.response is None else problem.response
    if answer is None:
        rule = "must be given, because keep.originals writes it"
        raise ConfigError(f"{problem.place}: response or answer: {rule}, is missing; nearest: keep.originals=false")
    return assistant(answer, "" if thinking else None)


def _check_fields(reward: RewardConfig, problems: Sequence[ProblemRecord]) -> None:
    """Rejects a problem to which no part of the reward with a verdict applies."""
    if any(part.domains is not None for part in reward.parts):
        check_problems(reward, lambda: problems)
        return
    kinds = [part.kind for part in reward.parts if part.weight]
    wanted = {field: kind for kind in kinds if (field := SCORERS.get(kind).needs) is not None}
    for problem in problems:
        if wanted and not any(getattr(problem, field) is not None for field in wanted):
            field, kind = next(iter(wanted.items()))
            raise ConfigError(
                f"{problem.place}: {field}: must be given, because the reward has the part {kind}, is missing; "
                f"nearest: reward={'code' if field == 'answer' else 'maths'}"
            )


def _made_with(config: SampleCommandConfig, job: SamplingJob) -> dict[str, Any]:
    """Returns what decides the samples and their scores, as plain values."""
    return {
        "ckpt": str(job.source.folder),
        "step": None if job.source.is_hf else read_step(job.source.folder),
        "weights": config.weights,
        "dtype": job.source.resolve(config.dtype),
        "speculative": config.speculative,
        "problems": _digest_problems(job.problems),
        "chat": next(name for name, template in CHAT_TEMPLATES.items() if template is job.template),
        "thinking": job.thinking,
        # Absent without system prompts, so that journals from before this key continue.
        **({"system": job.system} if job.system else {}),
        "num_samples": config.num_samples,
        "max_new_tokens": config.max_new_tokens,
        "sampling": asdict(job.request.sampling),
        "reward": encode(config.reward.parts),
        **({"models": [str(source.folder) for source in job.models.values()]} if job.models else {}),
    }


def _open_models(config: SampleCommandConfig, job: SamplingJob, engine: Engine) -> "dict[str, ModelPart]":
    """Reads the weights of judges and reward models. A judge that is the policy uses its engine."""
    from infer.engines.local import LocalEngine
    from train.post.sample import PromptForm
    from train.post.score import JudgePart, LocalRater, QuestionedModel

    parts: dict[str, ModelPart] = {}
    for number, (name, part) in enumerate(config.reward.named_parts.items()):
        if (source := job.models.get(name)) is None:
            continue
        model = None if source is job.source else load_model(source, config.dtype, config.device)
        positions = source.model.max_position_tokens
        if isinstance(part, RewardModelScorerConfig):
            assert model is not None
            rater = LocalRater(positions, part.batch_size, model)
            form = PromptForm(template=job.template, tokenizer=job.tokenizer, thinking=job.thinking)
            parts[name] = rater if part.question is None else QuestionedModel(rater, part.question, form)
        elif isinstance(part, JudgeConfig):
            longest = positions - part.max_new_tokens
            judge = Judge(part, job.template, job.tokenizer, read_constitution(part), longest, number)
            judging = engine if model is None else LocalEngine(model, batch_size=config.batch_size)
            stop = frozenset(source.end_ids)
            parts[name] = JudgePart(judge=judge, engine=judging, seed=config.seed, stop=stop)
    return parts


def _sample(
    config: SampleCommandConfig,
    job: SamplingJob,
    left: Sequence[NumberedPrompt],
    journal: SampleJournal,
    reward: Reward | None,
    made_with: Mapping[str, Any],
) -> None:
    model = load_model(job.source, config.dtype, config.device)
    choices = {key: made_with[key] for key in ("chat", "thinking", "dtype") if getattr(config, key) in ("auto", None)}
    if choices:
        print(", ".join(f"{key}={str(value).lower()}" for key, value in choices.items()), file=sys.stderr, flush=True)
    from infer.engines.local import LocalEngine

    engine: Engine = LocalEngine(model, speculative=config.speculative, batch_size=config.batch_size)
    models = _open_models(config, job, engine)
    parts = config.reward.named_parts
    # The draws of a sample depend on its numbers alone, so the size of a block changes no sample.
    size = max(1, 4 * config.batch_size // config.num_samples)
    for first in range(0, len(left), size):
        block = left[first : first + size]
        generated = engine.generate(block, job.request)
        answers = [replace(rollout, text=_text(rollout, job)) for rollout in generated.rollouts]
        # The engine returns the samples of a prompt next to each other.
        groups = [
            Group(
                number=prompt.number,
                tokens=prompt.tokens,
                key=job.problems[prompt.number].key,
                problem=problem_of(job.problems[prompt.number]),
                answers=tuple(answers[at * config.num_samples : (at + 1) * config.num_samples]),
            )
            for at, prompt in enumerate(block)
        ]
        rules = None if reward is None else reward.score_groups(groups)
        rated = {name: score_judged(parts[name], groups, partial(part.score, step=0)) for name, part in models.items()}
        sheets = combine(config.reward, groups, rules, rated)
        for prompt, group, scored in zip(block, groups, sheets, strict=True):
            pairs = zip(group.answers, scored.sheets, strict=True)
            samples = tuple(
                ScoredSample(
                    text=answer.text, num_tokens=answer.num_tokens, is_finished=answer.is_finished, sheet=sheet
                )
                for answer, sheet in pairs
            )
            journal.append(prompt.number, samples)
        done = f"{len(journal.samples)} of {len(job.prompts)} problems"
        print(f"{done}: {generated.statistics.summary()}", file=sys.stderr, flush=True)


def _text(answer: Sample, job: SamplingJob) -> str:
    """Decodes an answer. Thoughts that the prompt opened are opened again, so that scorers see them."""
    text = job.tokenizer.decode(answer.tokens[:-1] if answer.is_finished else answer.tokens)
    return THINK + text if job.thinking else text


def _records(
    keep: KeepConfig,
    job: SamplingJob,
    samples: Mapping[int, Sequence[ScoredSample]],
    selection: SampleSelection,
    made_with: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yields conversations for fine-tuning: original answers if wanted, then selected samples."""
    for number, original in enumerate(job.originals):
        messages = (*job.problems[number].messages, original)
        yield {"messages": [_to_plain(message) for message in messages], "provenance": {"prompt": number}}
    shared = {key: made_with[key] for key in ("ckpt", "step", "weights", "chat", "max_new_tokens", "sampling")}
    for selected in selection.kept:
        sample = samples[selected.problem][selected.sample]
        first = _system_messages(job.system, selected.problem) if keep.system else ()
        messages = (*first, *job.problems[selected.problem].messages, selected.message)
        scores = {kind: score.value for kind, score in sample.sheet.parts.items()}
        yield {
            "messages": [_to_plain(message) for message in messages],
            "provenance": {
                **shared,
                "prompt": selected.problem,
                "sample": selected.sample,
                "tokens": sample.num_tokens,
                "reward": sample.sheet.total,
                "scores": scores,
            },
        }


def _to_plain(message: ChatMessage) -> dict[str, Any]:
    """Returns a message as the reader of conversations accepts it, without absent fields."""
    values = asdict(message)
    return {name: value for name, value in values.items() if value is not None and value != ()}


def load_problems(config: ProblemsConfig) -> list[ProblemRecord]:
    """Returns the problems in order."""
    match config:
        case FileProblemsConfig(path=path):
            return read_lines(
                "problems.path", path, lambda values, place: read_problem(values, place, place, needs_answer=True)
            )
        case ArithmeticProblemsConfig():
            check_domains(config.domains, "problems.domains")
            seed = config.generator_seed
            count = config.count
            problems = arithmetic_problems(seed, count, config.num_digits, config.part, config.domains)
            return [problem.record(f"problems: number {number}") for number, problem in enumerate(problems)]


def _digest_problems(problems: Sequence[ProblemRecord]) -> str:
    """Returns a hash of the problems, which identifies them when sampling is resumed."""
    content = [[repr(problem.messages), problem.answer, repr(problem.tests), problem.domain] for problem in problems]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


preview = preview_of("sample", _read, _prepare)

if __name__ == "__main__":
    sys.exit(command("sample", main, preview))

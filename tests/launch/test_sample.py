"""Tests of `launch.sample`: it keeps the right answers, resumes to the same bytes, and rejects invalid problems."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import launch.sample
from base.refusal import ConfigError
from comm.dispatch.local import LocalDispatcher
from data.arithmetic import arithmetic_tokenizer
from data.arithmetic import problems as arithmetic_problems
from data.chat.encode import encode_conversations, encode_prompt
from data.chat.messages import Conversation, assistant, read_conversation, user
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError
from data.tokenizer import Tokenizer
from infer.config import GenerateError, Sampling
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request
from launch.sample import main, original_answer
from launch.weights.scored_samples import KeepConfig, SampleJournal, ScoredSample, select, to_message
from model.transformer import SCORE, Transformer, initialize_weights, named_tensors
from score.reward import ScoreSheet
from score.score import Score
from tests.launch.checkpoints import write_checkpoint
from tests.refusals import assert_refused
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.checkpoint.manifest import read_model

NUM_PROBLEMS, NUM_SAMPLES, TOKENS = 7, 3, 6
END_IDS = tuple(range(40, 100))  # the tiny model hardly ever chooses the end of sentence
V3, R1 = CHAT_TEMPLATES.get("v3"), CHAT_TEMPLATES.get("r1")
RATED = "reward.parts=[{kind: exact, weight: 2, boxed: false, ignore_case: false}]"


@pytest.fixture(autouse=True)
def more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets more tokens end an answer, so that some answers are finished and others are cut."""
    found = launch.sample.find_weights  # type: ignore[attr-defined]
    monkeypatch.setattr(
        launch.sample, "find_weights", lambda *names, **how: replace(found(*names, **how), end_ids=END_IDS)
    )


@pytest.fixture(scope="module")
def rollouts(run: Path) -> list[list[tuple[str, int]]]:
    """Returns the text of each problem's samples, and whether the model ended them."""
    folder = locate(str(run)).folder
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    engine = LocalEngine(load_whole(read_model(folder), folder, torch.float32))
    prompts = [
        NumberedPrompt(number=number, tokens=tuple(encode_prompt([user(f"problem {number}")], V3, tokenizer)))
        for number in range(NUM_PROBLEMS)
    ]
    request = Request(
        samples=NUM_SAMPLES, max_new_tokens=TOKENS, sampling=Sampling(temperature=0.8, seed=5), stop=frozenset(END_IDS)
    )
    made = engine.generate(prompts, request).rollouts
    texts = [tokenizer.decode(each.tokens[:-1] if each.finish == "stop" else each.tokens) for each in made]
    finished = [each.finish == "stop" for each in made]
    pairs = list(zip(texts, finished, strict=True))
    return [pairs[first : first + NUM_SAMPLES] for first in range(0, len(pairs), NUM_SAMPLES)]  # type: ignore[misc]


def write_problems(path: Path, answers: list[str]) -> str:
    lines = [json.dumps({"prompt": f"problem {number}", "answer": answer}) for number, answer in enumerate(answers)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return f"problems.path={path}"


def overrides(run: Path, problems: str, out: Path, *others: str) -> list[str]:
    sizes = [f"num_samples={NUM_SAMPLES}", f"max_new_tokens={TOKENS}", "seed=5", "batch_size=2", "chat=v3"]
    return [f"ckpt={run}", problems, f"out={out}", *sizes, *others]


def test_sample_journal_holds_what_the_engine_generates_with_scores(
    run: Path, rollouts: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A text that spells a special token cannot be written as a message.
    fits = [[text for text, is_finished in samples if is_finished and "<｜" not in text] for samples in rollouts]
    ended = [[text for text in texts if text.strip()] for texts in fits]
    answers = [" ".join(texts[0].split()) if texts else "none" for texts in ended]
    out = tmp_path / "new" / "kept.jsonl"
    assert main(overrides(run, write_problems(tmp_path / "p.jsonl", answers), out)) == 0
    head, *lines = (out.parent / "kept.jsonl.samples").read_text(encoding="utf-8").splitlines()
    assert json.loads(head)["num_samples"] == NUM_SAMPLES
    found = [json.loads(line) for line in lines]
    assert [each["problem"] for each in found] == list(range(NUM_PROBLEMS))
    assert [[(s["text"], s["is_finished"]) for s in each["samples"]] for each in found] == rollouts
    printed = capsys.readouterr()
    assert f"{NUM_PROBLEMS * NUM_SAMPLES}: " in printed.out
    assert "\nthinking=false, dtype=float32\n" in printed.err
    assert re.search(rf"\n{NUM_PROBLEMS} of {NUM_PROBLEMS} problems: .*\d+ passes", printed.err)
    assert "pass@1" in printed.out
    # What is kept is right, ended by the model, and readable by the source of conversations.
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {record["provenance"]["prompt"] for record in records} == {n for n, texts in enumerate(ended) if texts}
    assert 2 < len(records) < NUM_PROBLEMS * NUM_SAMPLES
    for record in records:
        number, sample = record["provenance"]["prompt"], record["provenance"]["sample"]
        text, is_finished = rollouts[number][sample]
        assert is_finished
        assert text.split() == answers[number].split()
        assert read_conversation(record, "line").messages[-1].content == text


def test_an_original_answer_ends_the_thoughts_that_the_prompt_of_samples_begins() -> None:
    """Both kinds of samples answer the same prompt, and an answer with thoughts begins with it, too."""
    (made,) = arithmetic_problems(0, 1, domains=("parity",))
    problem, tokenizer = made.record("here"), arithmetic_tokenizer()
    assert int(made.answer) == sum(map(int, made.prompt.strip("="))) % 2
    assert (made.steps[0::2], made.steps[-1]) == (made.prompt.strip("="), made.answer)
    for template, thoughts in ((R1, ""), (R1, made.steps), (V3, None)):
        original = original_answer(problem, thinking=template.thinks)
        last = assistant(made.answer, thoughts) if thoughts else original
        (chat,) = encode_conversations([Conversation(messages=(*problem.messages, last))], template, tokenizer)
        prompt = encode_prompt(problem.messages, template, tokenizer)
        assert chat.ids[: len(prompt)] == prompt
        assert tokenizer.decode(chat.ids[len(prompt) : -1]).startswith(thoughts or "")
        assert chat.is_target == [False] * len(prompt) + [True] * (len(chat.ids) - len(prompt))


def test_samples_of_system_prompts_are_written_with_or_without_them_and_next_to_original_answers(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "check.txt").write_text("Check your answer.\n", encoding="utf-8")
    system = f"system=[Reflect first., {tmp_path / 'check.txt'}]"
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"p{at}", "answer": "a", "response": f"long {at}"}) for at in range(7))
    )
    rated = "reward.parts=[{kind: repetition, weight: 1, ngram_words: 3}]"  # keeps each answer that has ended
    given = overrides(run, f"problems.path={tmp_path / 'p.jsonl'}", tmp_path / "kept.jsonl", rated, system)
    given += ["keep.min_reward=-9", "keep.originals=true"]
    written = {}
    for keeps in ("true", "false"):
        assert main([*given, f"keep.system={keeps}"]) == 0
        records = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
        originals = [each["messages"] for each in records if "sample" not in each["provenance"]]
        assert originals == [
            [{"role": "user", "content": f"p{at}"}, {"role": "assistant", "content": f"long {at}"}] for at in range(7)
        ]
        written[keeps] = [each for each in records if "sample" in each["provenance"]]
    assert len(written["true"]) > 1
    for full, plain in zip(written["true"], written["false"], strict=True):
        number = full["provenance"]["prompt"]
        text = ("Reflect first.", "Check your answer.")[number % 2]
        assert full["messages"] == [{"role": "system", "content": text}, *plain["messages"]]
        assert [message["role"] for message in plain["messages"]] == ["user", "assistant"]
    # The model reads the system prompts, and their samples are not mixed with others.
    drawn = (tmp_path / "kept.jsonl.samples").read_bytes().splitlines()[1:]
    plain_out = [each.replace("kept.jsonl", "plain.jsonl") for each in given if not each.startswith("system=")]
    assert main(plain_out) == 0
    assert (tmp_path / "plain.jsonl.samples").read_bytes().splitlines()[1:] != drawn
    with pytest.raises(ConfigError, match=r"^system: must be as in"):
        main([each for each in given if not each.startswith("system=")])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.62, 0.97])
def test_sample_that_was_interrupted_at_any_byte_ends_with_the_same_files(
    run: Path, rollouts: list, tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [next((text for text, is_finished in samples if is_finished), "none") for samples in rollouts]
    problems = write_problems(tmp_path / "p.jsonl", [text if text.strip() else "none" for text in answers])
    files = {}
    for name in ("whole", "cut"):
        out = tmp_path / f"{name}.jsonl"
        main(overrides(run, problems, out))
        journal = tmp_path / f"{name}.jsonl.samples"
        if name == "cut":
            content = journal.read_bytes()
            journal.write_bytes(content[: int(len(content) * share)])
            main(overrides(run, problems, out, "batch_size=5"))
        files[name] = (out.read_bytes(), journal.read_bytes())
    assert files["whole"] == files["cut"]
    assert all(files["whole"])
    capsys.readouterr()
    main(overrides(run, problems, tmp_path / "cut.jsonl", "keep.per_problem=1"))
    assert "reading the weights" not in capsys.readouterr().err  # another selection needs no new samples


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=6", "sampling"),
        ("num_samples=2", "num_samples"),
        ("max_new_tokens=7", "max_new_tokens"),
        (RATED, "reward"),
    ],
)
def test_sample_refuses_to_mix_samples_made_otherwise(run: Path, tmp_path: Path, change: str, key: str) -> None:
    problems = write_problems(tmp_path / "p.jsonl", ["a"])
    main(overrides(run, problems, tmp_path / "kept.jsonl"))
    before = (tmp_path / "kept.jsonl.samples").read_bytes()
    with pytest.raises(ConfigError, match=rf"^{key}: must be as in .* nearest valid: another out"):
        main([*overrides(run, problems, tmp_path / "kept.jsonl"), change])
    assert (tmp_path / "kept.jsonl.samples").read_bytes() == before


def test_sample_is_scored_by_models_and_refuses_those_that_cannot(run: Path, tmp_path: Path) -> None:
    """The policy's own weights judge alike from a folder; scores are those of the reward model."""
    problems = write_problems(tmp_path / "p.jsonl", ["a"] * 3)
    rated = tmp_path / "rated"
    config = replace(read_model(locate(str(run)).folder), head="score", mtp_depth=0)
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    initialize_weights(model, 1)
    with torch.no_grad():
        named_tensors(model)[SCORE].copy_(torch.linspace(-1, 1, config.hidden_size))
    write_checkpoint(rated, model)
    question = "reward.parts.0.question='{prompt}{answer}'"
    own = ["reward=judge", "keep.min_reward=0", question, "reward.parts.0.max_new_tokens=2"]
    own += ["reward.parts.0.accept=a", "reward.parts.0.reject=b", "reward.parts.0.mark=''"]
    rating = ["reward=reward_model", "keep.min_reward=-99", f"reward.parts.0.ckpt={rated}"]
    records = []
    for name, changes in (("policy", own), ("folder", [*own, f"reward.parts.0.weights={run}"]), ("rated", rating)):
        assert main(overrides(run, problems, tmp_path / f"{name}.jsonl", *changes)) == 0
        lines = (tmp_path / f"{name}.jsonl.samples").read_text("utf-8").splitlines()[1:]
        records.append([sample["sheet"] for line in lines for sample in json.loads(line)["samples"]])
    assert records[0] == records[1]
    assert {sheet["outcome"] for sheet in records[0]} <= {"rated", "unknown", "missing"}
    assert all(sheet["outcome"] == "rated" and sheet["total"] for sheet in records[2])
    for changes, rule in (
        (["reward.parts.0.weights=reference"], "must be policy or a folder"),
        ([f"reward.parts.0.weights={tmp_path / 'none'}"], "reward.parts, kind judge: weights: .*none"),
        ([f"reward.parts.0.weights={rated}"], "is a reward model; nearest valid: kind reward_model"),
        (["reward.parts.0.max_new_tokens=9999"], "max_new_tokens must be below the judge's"),
    ):
        with pytest.raises(ValueError, match=rule):
            main(overrides(run, problems, tmp_path / "refused.jsonl", *own, *changes))


BROKEN = [
    ('{"prompt": "a"', "p.jsonl, line 2: must be a JSON object"),
    ("[1]", "p.jsonl, line 2: must be a JSON object, is a list"),
    ('{"answer": "a"}', "p.jsonl, line 2: prompt: must be given, has the fields answer"),
    (
        '{"promt": "a", "answer": "b"}',
        "p.jsonl, line 2: prompt: must be given, .* nearest valid: prompt instead of promt",
    ),
    ('{"prompt": "a"}', "p.jsonl, line 2: answer or tests: must be given"),
    ('{"prompt": "a", "anwser": "b"}', "p.jsonl, line 2: answer or tests: .* nearest valid: answer instead of anwser"),
    ('{"prompt": "a", "answer": null}', "p.jsonl, line 2: answer or tests: must be given"),
    (
        '{"prompt": 3, "answer": "b"}',
        "p.jsonl, line 2: prompt: must be a list of messages|p.jsonl, line 2: prompt: must be",
    ),
    ('{"prompt": "a", "answer": 3}', "p.jsonl, line 2: answer: must be a string, is a number: 3"),
    ('{"prompt": "a", "answer": " "}', "p.jsonl, line 2: answer: must have text"),
    ('{"prompt": "a", "tests": "assert ("}', "p.jsonl, line 2: tests: must be Python, is not"),
    ('{"prompt": "a", "tests": "# none"}', "p.jsonl, line 2: tests: must have at least one statement"),
    ('{"prompt": "a", "tests": {}}', "p.jsonl, line 2: tests: must be Python source, or a list"),
    ('{"prompt": "a", "tests": []}', "p.jsonl, line 2: tests: must have at least one item"),
    ('{"prompt": "a", "tests": [{"stdin": "1"}]}', r"p.jsonl, line 2: tests\[0\].stdout: must be given"),
    (
        '{"prompt": "a", "tests": [{"input": "1", "stdout": ""}]}',
        r"p.jsonl, line 2: tests\[0\].input: .* nearest valid: stdin",
    ),
    (
        '{"prompt": "a", "tests": "assert f(1)"}',
        "p.jsonl, line 2: answer: must be given, because the reward has the part exact",
    ),
    ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": "b"}', "p.jsonl, line 2: prompt"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_sample_rejects_a_problem_by_file_line_and_field(run: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    given = overrides(run, f"problems.path={path}", tmp_path / "kept.jsonl")
    assert re.search(message, assert_refused((DataError, ConfigError), (), lambda: main(given)))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("problems.path=missing.jsonl", "problems.path: must be a file, 'missing.jsonl' does not exist"),
        ("temperature=-1", "temperature: must be finite"),
        ("num_samples=0", "num_samples: must be above 0"),
        ("chat=v4", "chat: must be one of v3, r1, r1_distill, v3_1, auto"),
        ("thinking=true", "thinking: must be false with chat=v3"),
        ("chat=auto", "chat: auto needs weights of a run on chats"),
        ("chat=r1", "chat: r1 places the token '<think>'"),
        ("keep.easy_rate=2", "keep.easy_rate: must be between 0 and 1"),
        ("reward.parts=[{kind: repetition, weight: 1, ngram_words: 3}]", "keep.min_reward: a value is needed"),
        ("max_new_tokens=0", "max_new_tokens: must be above 0"),
        ("system=[reflect.txt]", "system.0: must be a file, 'reflect.txt' does not exist"),
        ("system=['  ']", "system.0: must have text"),
        ("keep.system=false", "keep.system: must be true without system"),
        ("reward=judge", "keep.min_reward: a value is needed if no part of the reward has a verdict"),
    ],
)
def test_sample_rejects_invalid_values_before_weights_are_read(
    run: Path, tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write_problems(tmp_path / "p.jsonl", ["a"])
    with pytest.raises((ConfigError, GenerateError, DataError), match=message):
        main([*overrides(run, problems, tmp_path / "kept.jsonl"), change])
    assert "reading the weights" not in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.jsonl"]


def sample(text: str, outcome: str = "correct", total: float = 1.0, *, is_finished: bool = True) -> ScoredSample:
    score = Score(value=total, outcome=outcome)  # type: ignore[arg-type]
    sheet = ScoreSheet(total=total, outcome=outcome, parts={"exact": score})  # type: ignore[arg-type]
    return ScoredSample(text=text, num_tokens=len(text), is_finished=is_finished, sheet=sheet)


KEEP = {"per_problem": 2, "easy_rate": 0.75, "easy_per_problem": 1, "min_reward": None, "system": True}
KEEP |= {"originals": False}
# Samples of one problem, changes of the configuration, numbers of the kept ones, reasons of the others.
SELECTIONS = [
    ([sample("a"), sample("b", "wrong")], {}, [0], {"wrong": 1}),
    ([sample("a", "wrong"), sample("b", "timeout"), sample("c", "error")], {}, [],
     {"wrong": 1, "timeout": 1, "error": 1}),
    ([sample("a", is_finished=False), sample("b", "wrong")], {}, [], {"cut at the limit of tokens": 1, "wrong": 1}),
    ([sample("a  b"), sample("a b"), sample("x", "wrong")], {}, [0], {"duplicate": 1, "wrong": 1}),
    ([sample(x) for x in "abc"] + [sample("x", "wrong")] * 2, {}, [0, 1],
     {"over the limit of a problem": 1, "wrong": 2}),
    ([sample(x) for x in "abc"] + [sample("x", "wrong")], {}, [0], {"over the limit of a problem": 2, "wrong": 1}),
    ([sample("a", total=1), sample("b", total=3), sample("c", total=2)] + [sample("x", "wrong")] * 2, {}, [1, 2],
     {"over the limit of a problem": 1, "wrong": 2}),
    ([sample("a", total=0.5), sample("b"), sample("x", "wrong")], {"min_reward": 0.8}, [1],
     {"below the least reward": 1, "wrong": 1}),
    ([sample("a"), sample("x", "unknown"), sample("x", "error")], {}, [0], {"unknown": 1, "error": 1}),
    ([sample("a", "rated"), sample("b", "rated")], {}, [0, 1], {}),
    ([sample("a<｜User｜>b"), sample(" "), sample("x", "wrong")], {}, [], {"not well-formed": 2, "wrong": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "changes", "kept", "left_out"), SELECTIONS)
def test_selection_is_as_in_the_table(samples: list, changes: dict, kept: list[int], left_out: dict) -> None:
    found = select({4: samples}, KeepConfig(**{**KEEP, **changes}), V3, thinking=False)
    assert [(each.problem, each.sample) for each in found.kept] == [(4, number) for number in kept]
    assert found.left_out == left_out
    assert len(samples) == len(found.kept) + sum(found.left_out.values())


@pytest.mark.parametrize(
    ("text", "template", "thinking", "content", "thoughts"),
    [
        ("a", V3, False, "a", None),
        ("<think>\nhm\n</think>\n\na", R1, True, "a", "\nhm"),
        ("<think>hm</think>a", R1, True, "a", "hm"),
        ("<think>hm", R1, True, None, None),
        ("<think>hm</think>", R1, True, None, None),
        ("<think>a</think>b</think>c", R1, True, None, None),
        ("a</think>b", V3, False, None, None),
        ("", V3, False, None, None),
    ],
)
def test_message_of_an_answer_is_what_the_template_can_express(  # type: ignore[no-untyped-def]
    text: str, template, thinking: bool, content: str | None, thoughts: str | None
) -> None:
    message = to_message(text, template, thinking=thinking)
    assert (message and message.content, message and message.thoughts) == (content, thoughts)


def test_journal_of_other_samples_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.samples"
    path.write_bytes(b'{"format": 1, "seed": 1}\n{"problem": ')
    with pytest.raises(ConfigError, match=r"seed: must be as in .*made with 1, is 2"):
        SampleJournal(path, {"seed": 2})
    assert path.read_bytes().endswith(b'{"problem": ')

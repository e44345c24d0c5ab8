"""Tests of sets of benchmarks: every line of the report's tables is there, and a set runs on a run's weights."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from base.refusal import ConfigError
from evaluation.benchmarks import SETS, open_manager, read_set
from evaluation.protocol import EvaluationError
from launch.evaluate import main
from tests.launch.checkpoints import write_run

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed (pip install -e '.[lm-eval]')")

# The lines of tables 3 and 6 of arXiv:2412.19437, with the values of DeepSeek-V3.
TABLES = {
    "v3_base": """
Pile-test (BPB) 0.548|BBH (EM) 87.5|MMLU (Acc.) 87.1|MMLU-Redux (Acc.) 86.2|MMLU-Pro (Acc.) 64.4|DROP (F1) 89.0
ARC-Easy (Acc.) 98.9|ARC-Challenge (Acc.) 95.3|HellaSwag (Acc.) 88.9|PIQA (Acc.) 84.7|WinoGrande (Acc.) 84.9
RACE-Middle (Acc.) 67.1|RACE-High (Acc.) 51.3|TriviaQA (EM) 82.9|NaturalQuestions (EM) 40.0|AGIEval (Acc.) 79.6
HumanEval (Pass@1) 65.2|MBPP (Pass@1) 75.4|LiveCodeBench-Base (Pass@1) 19.4|CRUXEval-I (Acc.) 67.3
CRUXEval-O (Acc.) 69.8|GSM8K (EM) 89.3|MATH (EM) 61.6|MGSM (EM) 79.8|CMath (EM) 90.7|CLUEWSC (EM) 82.7
C-Eval (Acc.) 90.1|CMMLU (Acc.) 88.8|CMRC (EM) 76.3|C3 (Acc.) 78.6|CCPM (Acc.) 92.0|MMMLU-non-English (Acc.) 79.4""",
    "v3_chat": """
MMLU (EM) 88.5|MMLU-Redux (EM) 89.1|MMLU-Pro (EM) 75.9|DROP (3-shot F1) 91.6|IF-Eval (Prompt Strict) 86.1
GPQA-Diamond (Pass@1) 59.1|SimpleQA (Correct) 24.9|FRAMES (Acc.) 73.3|LongBench v2 (Acc.) 48.7
HumanEval-Mul (Pass@1) 82.6|LiveCodeBench (Pass@1-COT) 40.5|LiveCodeBench (Pass@1) 37.6|Codeforces (Percentile) 51.6
SWE Verified (Resolved) 42.0|Aider-Edit (Acc.) 79.7|Aider-Polyglot (Acc.) 49.6|AIME 2024 (Pass@1) 39.2
MATH-500 (EM) 90.2|CNMO 2024 (Pass@1) 43.2|CLUEWSC (EM) 90.9|C-Eval (EM) 86.5|C-SimpleQA (Correct) 64.8""",
}
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXT: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{choices[0]}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}
ANSWER: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["zz"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("name", TABLES)
def test_sets_have_every_line_of_the_reports_tables(name: str) -> None:
    lines = [entry.rpartition(" ") for entry in TABLES[name].strip().replace("\n", "|").split("|")]
    assert [(line.line, line.published) for line in read_set(name).lines] == [
        (line, float(value)) for line, _, value in lines
    ]


def _leaves(manager: "TaskManager", names: list[Any]) -> Iterator[Mapping[str, Any]]:
    """Yields the configurations of the tasks that names, or entries of a group, stand for."""
    for name in names:
        member = name if isinstance(name, str) else name.get("task") or name["group"]
        if isinstance(member, list):
            yield from _leaves(manager, member)
            continue
        entry = manager.task_index[member]
        if entry.kind.name == "TAG":
            yield from _leaves(manager, sorted(entry.tags))
        elif entry.kind.name == "GROUP":
            assert entry.cfg is not None
            yield from _leaves(manager, entry.cfg["task"])
        else:
            assert entry.cfg is not None
            yield entry.cfg


@needs_harness
@pytest.mark.long
def test_every_named_task_is_in_the_harness_with_its_metric() -> None:
    for name in TABLES:
        benchmarks = read_set(name)
        manager = open_manager(benchmarks)
        for line in benchmarks.lines:
            configs = list(_leaves(manager, list(line.tasks)))
            assert any(config.get("unsafe_code", False) for config in configs) == line.runs_code, line.line
            for config in configs:
                metric, _, used = str(line.metric).partition(",")
                named = [str(entry["metric"]).rpartition(".")[2] for entry in config["metric_list"]]
                assert metric.replace("pass@1", "pass_at_k") in named, (line.line, named)
                assert used in [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]], line.line


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def own_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's set with tasks of their own on a file, and no network."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    (tmp_path / "tasks").mkdir()
    questions = [
        {"context": f"def f(x):{' ' * (n % 5)}", "choices": ["\n    return", " x", "naïve"], "answer": answer}
        for n, answer in enumerate([0] * 5 + [1] * 4 + [2] * 3)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    local: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
    }
    tasks: dict[str, dict[str, Any]] = {
        "own_choice": {**CHOICE, **local},
        "own_text": {**TEXT, **local},
        "own_answers": {**ANSWER, **local},
        "own_program": {**ANSWER, **local, "unsafe_code": True},
        "own_missing": {**CHOICE, "dataset_path": "nobody/nothing"},
    }
    for name, config in tasks.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "test_split": "test", "fewshot_split": "test", **config})
        )
    choice = {"tasks": ["own_choice"], "shots": 0, "metric": "acc,none"}
    text = {"tasks": ["own_text"], "shots": 0, "metric": "perplexity,none", "percent": False}
    answers = {"tasks": ["own_answers"], "shots": 0, "metric": "exact_match,none"}
    lines = [
        {"line": "Choice", **choice, "published": 50},
        {"line": "Long", **answers, "changes": {"generation_kwargs": {"max_gen_toks": 99999}}},
        {"line": "Text", **text},
        {"line": "Other metric", **choice, "metric": "f1,none"},
        {"line": "Shots", **text, "shots": 2},
        {"line": "Answers", **answers},
        {"line": "Program", **answers, "tasks": ["own_program"], "runs_code": True},
        {"line": "Hidden program", **answers, "tasks": ["own_program"]},
        {"line": "Missing", **choice, "tasks": ["own_missing"]},
        {"line": "Never", "reason": "nothing stands for it"},
    ]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"source": "mine", "include": "tasks", "lines": lines}))
    return path


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["line"]: row for row in json.loads((folder / "results.json").read_text())["lines"]}


@needs_harness
@pytest.mark.long
def test_own_set_runs_skips_with_reasons_and_has_the_same_values_on_two_ranks(
    weights: Path, own_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"ckpt={weights}", f"set={own_set}"]
    with pytest.raises(EvaluationError, match="failed: Long, Other metric;"):
        main([*command, f"out={tmp_path}/one"])
    rows = _rows(tmp_path / "one")
    assert "failed: EvaluationError: max_new_tokens: must be below" in capsys.readouterr().out
    assert {name: row["num_samples"] for name, row in rows.items() if row["reason"] is None} == dict.fromkeys(
        ("Choice", "Text", "Shots", "Answers"), 12
    )
    # Every choice is right for another number of questions.
    assert rows["Choice"]["value"] in (pytest.approx(100 * right / 12) for right in range(1, 12))
    assert 1 < rows["Text"]["value"] != pytest.approx(rows["Shots"]["value"], rel=1e-4)
    for name, reason in {
        "Long": "max_new_tokens: must be below",
        "Other metric": "valid: acc,none",
        "Program": "allow_unsafe_code=true",
        "Hidden program": "runs_code: true",
        "Missing": "nobody/nothing",
        "Never": "nothing stands for it",
    }.items():
        assert reason in rows[name]["reason"], rows[name]

    with pytest.raises(EvaluationError, match="failed: Long, Other metric;"):
        main([*command, f"out={tmp_path}/two", "parallelism=two_ranks"])
    many = _rows(tmp_path / "two")
    for name, row in rows.items():
        assert many[name].pop("value") == (None if row["value"] is None else pytest.approx(row.pop("value"), rel=1e-6))
        assert many[name] == {key: value for key, value in row.items() if key != "value"}

    # Only lines that failed are run again, and the variable of Hugging Face is needed, too.
    capsys.readouterr()
    with pytest.raises(EvaluationError, match="failed: Long, Other metric;"):
        main([*command, f"out={tmp_path}/one", "allow_unsafe_code=true"])
    again = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if ": " in line]
    assert {"Long", "Other metric"} == {name for name in again if name in rows}
    assert "HF_ALLOW_CODE_EVAL=1" in _rows(tmp_path / "one")["Program"]["reason"]
    with pytest.raises(EvaluationError, match="set_limit: must be as in"):
        main([*command, f"out={tmp_path}/one", "set_limit=2"])
    # As a chat, the same questions have other values; a limit leaves the first ones.
    values = yaml.safe_load(own_set.read_text())
    text = [line for line in values["lines"] if line["line"] == "Text"]
    limited = {}
    for template in ("v3", None):
        own_set.write_text(yaml.safe_dump({**values, "lines": text, "chat_template": template}))
        main([*command, f"out={tmp_path}/chat_{template}", "set_limit=5"])
        limited[template] = _rows(tmp_path / f"chat_{template}")["Text"]
    assert [row["num_samples"] for row in limited.values()] == [5, 5]
    assert limited["v3"]["value"] != pytest.approx(limited[None]["value"], rel=1e-3)

    own_set.write_text(yaml.safe_dump({**values, "lines": values["lines"][6:]}))
    with pytest.raises(ConfigError, match="set: must have a line that can run"):
        main([*command, f"out={tmp_path}/none"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"source": 1}, "set.source: must be text"),
        ({"lines": [{"line": "A"}]}, r"set.lines\[0\]: must have either tasks or a reason"),
        ({"lines": [{"line": "A", "tasks": ["t"], "reason": "b"}]}, "must have either tasks or a reason"),
        ({"lines": [{"line": "A", "tasks": ["t"], "shots": 1}]}, "must have shots and metric"),
        ({"lines": [{"line": "A", "reason": "b"}] * 2}, r"set.lines\[1\].line: must be unique"),
        ({"lines": [{"line": "A", "reason": "b", "form": "c"}]}, r"set.lines\[0\].form: unknown key"),
        ({"include": "nowhere"}, "set.include: must be a folder"),
    ],
)
def test_sets_that_break_a_rule_are_rejected(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"source": "mine", "lines": [], **changes}))
    with pytest.raises(ConfigError, match=problem):
        read_set(str(path))


def test_names_of_sets_and_missing_packages_are_rejected(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="set: must be v3_base, v3_chat or a YAML file, is 'v3_bse'; did you mean"):
        read_set("v3_bse")
    (tmp_path / "bad.yaml").write_text("lines: [")
    with pytest.raises(ConfigError, match="set: must be YAML"):
        read_set(str(tmp_path / "bad.yaml"))
    command = [f"ckpt={weights}", "set=v3_base", f"out={tmp_path}/out"]
    with pytest.raises(ConfigError, match="tasks: must be left out with set=v3_base"):
        main([*command, "tasks=[needle]"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm_eval: must be installed, is not"):
        main(command)


def test_shipped_sets_are_the_tables() -> None:
    assert {path.stem for path in SETS.glob("*.yaml")} == set(TABLES)

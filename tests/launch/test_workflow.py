"""Tests of `launch.workflow`: commands compose, interrupted ones continue, and the table has what was measured."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

import launch.workflow
from base.decode import encode
from base.refusal import ConfigError
from launch.config.compose import compose, options
from launch.weights.scored_samples import JOURNAL_SUFFIX, SampleJournal, ScoredSample
from launch.workflow import STATE_NAME, main, read_workflow, workflow_commands
from score.reward import ScoreSheet
from tests.commands import run_command

RIGHT, WRONG = (ScoreSheet(total=0.0, outcome=outcome, parts={}) for outcome in ("correct", "wrong"))


class FakeCommand:
    """A command that ends at once. `launch.sample` leaves a right and a wrong answer.

    Attributes:
        fails_at: number of commands after which one fails or is interrupted; None: none does.
    """

    started: list[tuple[str, ...]]
    fails_at: int | None
    failure: int | str

    def __init__(self, arguments: Sequence[str]) -> None:
        self._is_failing = len(self.started) == self.fails_at
        self.started.append(tuple(arguments[2:]))
        out = next((Path(each.removeprefix("out=")) for each in arguments if each.startswith("out=")), None)
        if out is not None and not self._is_failing:
            with SampleJournal(out.with_name(out.name + JOURNAL_SUFFIX), {}) as journal:
                answers = [("12", 3, RIGHT), ("21", 4, WRONG)]
                journal.append(
                    0,
                    tuple(
                        ScoredSample(text=text, num_tokens=count, is_finished=True, sheet=sheet)
                        for text, count, sheet in answers
                    ),
                )

    def wait(self) -> int:
        if not self._is_failing:
            return 0
        if self.failure == "interrupt":
            type(self).failure = 130
            raise KeyboardInterrupt
        assert isinstance(self.failure, int)
        return self.failure


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCommand]:
    FakeCommand.started, FakeCommand.fails_at, FakeCommand.failure = [], None, 0
    monkeypatch.setattr(launch.workflow.subprocess, "Popen", FakeCommand)  # type: ignore[attr-defined]
    return FakeCommand


@pytest.mark.slow
@pytest.mark.parametrize("name", options("workflow"))
def test_every_command_of_a_workflow_composes_and_reads_what_an_earlier_one_wrote(name: str) -> None:
    config = read_workflow([f"workflow={name}"])
    assert config.workflow.name == name
    assert config.out_dir == f"outputs/{name}"
    lines = workflow_commands(config)
    assert len({line.name for line in lines}) == len(lines)
    written: set[str] = set()
    for line in lines:
        module, *overrides = shlex.split(str(line))[2:]
        assert (module, *overrides) == line.arguments
        # launch.generate reads a prompt as it is written.
        compose(module.removeprefix("launch."), [each for each in overrides if not each.startswith("prompt=")])
        keys = [each.partition("=")[::2] for each in overrides]
        paths = {key: value for key, value in keys if config.out_dir in value}
        outputs = {
            paths.pop(key).removeprefix(f"{config.out_dir}/") for key in ("out_dir", "out", "to") if key in paths
        }
        assert outputs or module in ("launch.redraw", "launch.generate"), line
        for value in paths.values():
            inputs = {part.partition("/")[2] for part in value.split("outputs/")[1:]}
            assert {text.rstrip("],}").split(",")[0] for text in inputs} <= written, line
        written |= outputs


def test_workflow_continues_at_the_command_that_failed_and_then_only_prints_the_table(
    fake: type[FakeCommand], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["workflow=life", f"out_dir={tmp_path}", 'train=["task.steps=2"]']
    lines = workflow_commands(read_workflow(given))
    fake.fails_at, fake.failure = 3, 75
    assert main(given) == 75
    assert fake.started == [line.arguments for line in lines[:4]]
    fake.started, fake.fails_at, fake.failure = [], 2, "interrupt"
    with pytest.raises(KeyboardInterrupt):
        main(given)
    assert fake.started == [line.arguments for line in lines[3:6]]
    fake.started, fake.fails_at = [], None
    capsys.readouterr()
    assert main(given) == 0
    assert fake.started == [line.arguments for line in lines[5:]]
    printed = capsys.readouterr().out
    assert all(str(line) in printed for line in lines[5:])
    table = printed.splitlines()[-len([line for line in lines if line.evaluation is None]) - 3 :]
    assert table[0].split() == ["part", "sort", "pass@1", "sort", "maj@2", "sort", "tokens", "seconds"]
    assert [row.split()[0] for row in table[1:]] == [
        *(line.part for line in lines if line.evaluation is None),
        *("evaluations", "total"),
    ]
    assert table[2].split() == ["sft", "0.500", "1.00", "3.5", "0"]
    fake.started = []
    assert main(given) == 0
    assert fake.started == []
    assert capsys.readouterr().out.splitlines()[1:] == table


def test_workflow_refuses_a_folder_of_other_overrides_and_a_broken_state(
    fake: type[FakeCommand], tmp_path: Path
) -> None:
    given = ["workflow=life", f"out_dir={tmp_path}"]
    fake.fails_at, fake.failure = 1, 1
    main(given)
    with pytest.raises(ConfigError, match=r"^out_dir: pretrain must be as in .*; nearest valid: another out_dir"):
        main([*given, 'train=["task.steps=2"]'])
    (tmp_path / STATE_NAME).write_text("[]")
    with pytest.raises(ConfigError, match=r"^out_dir: .* must be the state of a workflow"):
        main(given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workflow.parts.sft.command=rm", r"^workflow.parts.sft.command: must be one of convert, .* is 'rm'"),
        ("workflow.parts.sft.evaluate=1", r"^workflow.parts.sft.evaluate: must be true or false"),
        ("train=all", r"^train: must be a list"),
        ("workflow.parts.sft=null", r"^workflow.parts.sft: must hold keys and values"),
    ],
)
def test_workflow_rejects_invalid_values(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_workflow(["workflow=life", override])


def test_workflow_refuses_too_many_runs_of_a_page_and_a_missing_grid_before_it_starts() -> None:
    with pytest.raises(ConfigError, match=r"^run: must be one to 6 folders, is 7 of them"):
        read_workflow(["workflow=life", "workflow.parts.report.overrides=['run=[a,b,c,d,e,f,g]']"])
    with pytest.raises(
        ConfigError, match=r"^workflow.grid: must have values, because .* is null; nearest valid: workflow=ablations"
    ):
        read_workflow(["workflow=ablations", "workflow.grid=null"])


def test_workflow_configuration_is_printed_as_its_files_have_it() -> None:
    assert encode(read_workflow(["workflow=post"])) == compose("workflow", ["workflow=post"])


class ForkedCommand:
    """A command in a fork, which needs no time for imports. Reinforcement learning validates with few answers."""

    def __init__(self, arguments: Sequence[str]) -> None:
        few = ["rollout.held_out=8", "rollout.held_out_samples=1"]
        self._done = run_command(
            [*arguments, *(few if {"experiment=arithmetic_grpo", "experiment=arithmetic_v3_rl"} & {*arguments} else [])]
        )

    def wait(self) -> int:
        assert self._done.returncode == 0, self._done.stdout + self._done.stderr
        return 0


SMALL_GRID = [
    *(f"~workflow.grid.variants.{name}" for name in ("mtp", "batch_loss", "fp8", "fp8_blocks")),
    *(f"~workflow.grid.tables.{name}" for name in ("mtp", "batch_wise", "fp8", "gradient_blocks")),
    *("workflow.grid.seeds=[0]", "workflow.parts.report.overrides=['run=[${out_dir}/base_seed0]']"),
    'train=["task.steps=2","validation.sequences=16"]',
]
"""Overrides that leave two short runs of the ablations, with one seed."""


@pytest.mark.long
@pytest.mark.parametrize("name", options("workflow"))
def test_workflow_runs_with_two_steps_in_each_part(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.workflow.subprocess, "Popen", ForkedCommand)  # type: ignore[attr-defined]
    steps = ["task.steps=2", "validation.sequences=0", "samples.tokens=0", f"data.cache_dir={tmp_path}/cache"]
    # Untrained models solve nothing. Answers are kept by a rating.
    sizes = ["problems.count=8", "num_samples=2", "keep.min_reward=-1"]
    sizes.append("reward.parts=[{kind: repetition, weight: 1, ngram_words: 3}]")
    folder = tmp_path / "workflow"
    given = [f"workflow={name}", f"out_dir={folder}", f"train={json.dumps(steps)}", f"sample={json.dumps(sizes)}"]
    fewer = {
        "post": ["~workflow.evaluations.reverse"],
        "ablations": SMALL_GRID,
        "distillation": ["workflow.grid.seeds=[0]"],
    }.get(name, [])
    assert main([*given, *fewer]) == 0
    assert name != "ablations" or (folder / "ablations.html").read_text().count("data:image/png") == 4
    records = json.loads((folder / STATE_NAME).read_text())
    assert all(record["is_done"] for record in records.values())
    assert name != "distillation" or "both_seed0/parity" in records
    assert len(list(folder.glob("*/comparison.html"))) == (name != "ablations")

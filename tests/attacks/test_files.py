"""Untrusted files run no code, and no source reads a file in a way that can execute it."""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from base.refusal import ConfigError
from comm.config import ParallelismConfig
from data.corpus import DataError
from data.tokenizer import Tokenizer
from dualpipe.builder import build_schedule
from dualpipe.ir import to_json
from launch.config.folder import read_folder, write_run_folder
from launch.convert import main as convert
from launch.redraw import main as redraw
from model.hf.files import HfError
from tests import ROOT
from tests.attacks import hostile
from tests.commands import run_command
from tests.launch.checkpoints import write_run
from tests.refusals import assert_refused
from tests.tiny import tiny_config, write_text
from train.checkpoint.manifest import CheckpointError
from train.config import TrainConfig
from train.core.guard import read_loss_and_norm
from train.files.json_lines import JsonLines, read_events
from train.files.run_files import Status, read_status, write_status
from train.start.plan import read_schedule

NOW = datetime(2024, 2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates weights as an exported folder (`hf`) and as converted weights (`converted`)."""
    folder = tmp_path_factory.mktemp("weights")
    write_run(folder / "run")
    convert(["from=checkpoint", f"path={folder / 'run'}", f"to={folder / 'hf'}", "max_shard_bytes=30000"])
    convert(["from=hf", f"path={folder / 'hf'}", f"to={folder / 'converted'}"])
    return folder


def refusal(act: Callable[..., object], *arguments: object) -> str:
    """Returns the error message, or nothing if there is no error."""
    try:
        act(*arguments)
    except (HfError, CheckpointError, DataError) as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), [("hf", "hf"), ("checkpoint", "converted")])
def test_a_pickle_in_any_file_of_weights_does_not_run(form: str, name: str, weights: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in (weights / name).iterdir())
    assert len(files) >= 4
    for number, file in enumerate(files):
        folder, proof = hostile.copy_of(weights / name, tmp_path / str(number)), tmp_path / "proof"
        (folder / file).write_bytes(hostile.payload_bytes(proof))
        said = refusal(convert, [f"from={form}", f"path={folder}", f"to={tmp_path / str(number)}_new", "format=hf"])
        assert "\n" not in said, file
        # What is no weight is carried along as it is, or left out.
        assert said or not file.endswith((".safetensors", "index.json")), file
        assert not proof.exists(), file


INDEXES: list[tuple[str, Callable[[Path], object], str]] = [
    ("leads out of the folder", lambda folder: edit_index(folder, "../../etc/passwd.safetensors"), "plain name"),
    ("leads to the root", lambda folder: edit_index(folder, "/etc/passwd.safetensors"), "plain name"),
    ("names a pickle", lambda folder: edit_index(folder, "pytorch_model.bin"), "plain name"),
    ("has 1 TiB", lambda folder: hostile.sparse(folder / "model.safetensors.index.json"), "must be at most"),
    ("links to itself", lambda folder: hostile.loop(folder / "model.safetensors.index.json"), "must exist"),
    ("is 100,000 deep", lambda folder: (folder / "model.safetensors.index.json").write_text('{"a":' * 10**5), "JSON"),
    ("names a file of 1 TiB", lambda folder: hostile.sparse(next(folder.glob("*.safetensors"))), "header"),
]  # fmt: skip


def edit_index(folder: Path, file: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(("spoil", "part"), [case[1:] for case in INDEXES], ids=[case[0] for case in INDEXES])
def test_a_hostile_index_is_rejected(spoil: Callable[[Path], object], part: str, weights: Path, tmp_path: Path) -> None:
    folder = hostile.copy_of(weights / "hf", tmp_path / "hf")
    spoil(folder)
    assert_refused(HfError, [part], lambda: convert(["from=hf", f"path={folder}", f"to={tmp_path / 'new'}"]))
    assert not (tmp_path / "new").exists()


def change_tokenizer(act: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        values = json.loads(path.read_text())
        act(values)
        path.write_text(json.dumps(values))

    return change


def split_by(pattern: str) -> Callable[[Path], None]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return change_tokenizer(lambda values: values.update(pre_tokenizer=split))


def added(number: object, text: str = "added") -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": True, **flags}


TOKENIZERS: list[tuple[str, Callable[[Path], object]]] = [
    ("1 TiB", hostile.sparse),
    ("a link to itself", hostile.loop),
    ("a pickle", lambda path: path.write_bytes(hostile.payload_bytes(path.with_name("proof")))),
    ("100,000 deep", lambda path: path.write_text('{"model":' * 10**5)),
    ("a list", lambda path: path.write_text("[]")),
    ("a vocabulary of texts", change_tokenizer(lambda values: values["model"].update(vocab={"a": "b"}))),
    ("an id below 0", change_tokenizer(lambda values: values["added_tokens"].append(added(-1)))),
    ("an id of 100 bits", change_tokenizer(lambda values: values["added_tokens"].append(added(2**100)))),
    ("a pattern that does not parse", split_by("(((")),
    ("exponential time: nested", split_by(r"(a+)+$")),
    ("exponential time: alternatives", split_by(r"^(a|a)*\d$")),
]


@pytest.mark.parametrize("spoil", [case[1] for case in TOKENIZERS], ids=[case[0] for case in TOKENIZERS])
def test_a_hostile_tokenizer_is_rejected_in_one_line(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer.train(["def f(x):\n    return x + 1\n"] * 9, 300).save(path)
    spoil(path)
    encode = lambda: Tokenizer.load(path, "data.tokenizer").encode_batch(["a" * 60 + "!"])  # noqa: E731
    assert_refused(DataError, [f"data.tokenizer: {path}"], encode)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("number", [300, 5, 10**9], ids=["the next id", "an id that is taken", "an id far outside"])
def test_a_tokenizer_with_an_odd_id_is_rejected_or_stays_within_its_size(number: int, tmp_path: Path) -> None:
    """The model's embedding has `vocab_size` rows: the command compares, and no id is above what it says."""
    path = tmp_path / "tokenizer.json"
    Tokenizer.train(["def f(x):\n    return x + 1\n"] * 9, 300).save(path)
    change_tokenizer(lambda values: values["added_tokens"].append(added(number)))(path)

    def check() -> None:
        tokenizer = Tokenizer.load(path, "data.tokenizer")
        assert max(tokenizer.encode("added def f(x)")) < tokenizer.vocab_size

    assert "\n" not in refusal(check)


def claimed(tmp_path: Path) -> Path:
    """Creates a run's folder."""
    write_text(tmp_path)
    return Path(write_run_folder(tiny_config(tmp_path), NOW).out_dir)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)

CONFIGS: list[tuple[str, Callable[[Path], object], str]] = [
    ("an unknown key", lambda path: append(path, "shell: rm\n"), "shell: unknown key"),
    ("a tag that calls", lambda path: append(path, "x: !!python/object/apply:os.system ['touch proof']\n"),
     "could not determine a constructor"),
    ("an object", lambda path: append(path, "x: !!python/object:train.config.TrainConfig {}\n"), "constructor"),
    ("an anchors bomb", lambda path: append(path, BOMB), "alias"),
    ("100,000 deep", lambda path: path.write_text("[" * 10**5), "cannot be read"),
    ("a list", lambda path: path.write_text("[1]"), "must hold keys and values"),
    ("a pickle", lambda path: path.write_bytes(hostile.payload_bytes(path.with_name("proof"))), "cannot be read"),
    ("1 TiB", hostile.sparse, "must be a file of at most"),
    ("another type", lambda path: path.write_text(path.read_text().replace("seed: 7", "seed: [7]", 1)), "seed: "),
]  # fmt: skip


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "part"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_a_hostile_config_of_a_run_is_rejected(
    spoil: Callable[[Path], object], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = claimed(tmp_path)
    spoil(run / "config.yaml")
    assert_refused(ConfigError, [part], lambda: redraw([f"run={run}"]))
    assert not list(tmp_path.rglob("proof"))


def test_a_config_that_names_another_folder_has_no_effect_there(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    path = run / "config.yaml"
    path.write_text(path.read_text().replace(f"out_dir: {run}", f"out_dir: {tmp_path / 'elsewhere'}"))
    assert str(tmp_path / "elsewhere") in path.read_text()
    assert read_folder(run).out_dir == str(run)
    assert redraw([f"run={run}"]) == 0
    assert not (tmp_path / "elsewhere").exists()


def test_a_config_edited_between_attempts_has_no_effect(tmp_path: Path) -> None:
    """The command writes config.yaml again from its own configuration before ranks restart."""
    done = run_command(["-m", "tests.attacks.edited_config", str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "second").read_text() == str(tmp_path / "run")
    assert not list(tmp_path.rglob("proof"))


LINES = [
    b'{"step": 1, "kind": "skipped", "loss": 2.5, "grad_norm": 1}\n',
    b"[" * 10**5 + b"\n",
    b'{"step": "1", "kind": "rolled_back"}\n',
    b'{"step": -4, "kind": "rolled_back"}\n',
    b'{"step": true, "kind": "rolled_back"}\n',
    b'{"step": ' + b"9" * 400 + b', "kind": "rolled_back"}\n',
    b'{"step": 2, "kind": ["rolled_back"], "loss": "nan", "grad_norm": null, "0": ["a", 1e999]}\n',
    b'["step"]\n',
    b"\xff\xfe\x00\n",
    b"null\n",
    b'{"step": 3, "kind": "<script>proof</script>", "text": "<script>proof</script>", "loss": 2.0, "grad_norm": 1.0}\n',
]


def test_hostile_lines_of_a_run_are_passed_over(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    for name in ("metrics.jsonl", "events.jsonl", "loads.jsonl"):
        (run / name).write_bytes(b"".join(LINES))
    (run / "schedule.svg").write_text("<svg><script>proof</script></svg>")
    assert [event["step"] for event in read_events(run)] == [1, 3]
    assert read_loss_and_norm(run / "metrics.jsonl", 9, 9) == [(2.5, 1.0), (2.0, 1.0)]
    assert redraw([f"run={run}"]) == 0
    assert "<script>proof" not in (run / "report.html").read_text()
    lines = JsonLines(run / "metrics.jsonl", 2)
    assert lines.last() == {
        "step": 2,
        "kind": ["rolled_back"],
        "loss": "nan",
        "grad_norm": None,
        "0": ["a", float("inf")],
    }
    lines.close()
    assert (run / "metrics.jsonl").read_bytes() == LINES[0] + LINES[6]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "loads.jsonl", "schedule.svg", "status.json"])
@pytest.mark.parametrize("spoil", [hostile.sparse, hostile.loop], ids=["1 TiB", "a link to itself"])
def test_a_foreign_file_in_a_run_is_ignored(name: str, spoil: Callable[[Path], object], tmp_path: Path) -> None:
    run = claimed(tmp_path)
    spoil(run / name)
    assert read_events(run) == []
    assert read_loss_and_norm(run / "metrics.jsonl", 9, 9) == []
    assert read_status(run) is None
    assert redraw([f"run={run}"]) == 0


@pytest.mark.parametrize(
    "content",
    [
        "[" * 10**5,
        "null",
        '{"state": "done", "step": "1"}',
        '{"state": "done", "exit_code": [0]}',
        '{"state": "rm -rf", "step": 1}',
        '{"state": "done", "step": 1, "unknown": 2}',
        '{"state": "stopped", "exit_code": 99999}',
        '{"state": "done", "checkpoint": {"a": 1}}',
        '{"state": "done", "missing_ranks": ["a"]}',
        '{"state": "done", "seconds_left": 1e999}',
    ],
)
def test_a_hostile_status_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
    write_status(tmp_path, Status(state="done"))
    assert read_status(tmp_path) is not None


def of_two_ranks(tmp_path: Path) -> TrainConfig:
    return replace(tiny_config(tmp_path), parallelism=ParallelismConfig(pipeline=2, data=1, expert=1))


def reversed_groups(text: str) -> str:
    """Reverses the order of each rank, so that all ranks would wait for each other."""
    values = json.loads(text)
    return json.dumps({**values, "ranks": [groups[::-1] for groups in values["ranks"]]})


SCHEDULES: list[tuple[str, Callable[[Path, str], object]]] = [
    ("not JSON", lambda path, text: path.write_text(text[:-9])),
    ("100,000 deep", lambda path, text: path.write_text("[" * 10**5)),
    ("an order in which ranks wait for each other", lambda path, text: path.write_text(reversed_groups(text))),
    ("one for other ranks", lambda path, text: path.write_text(to_json(build_schedule("1f1b", 4, 16)))),
    ("one for other micro-batches", lambda path, text: path.write_text(to_json(build_schedule("1f1b", 2, 4)))),
    ("1 TiB", lambda path, text: hostile.sparse(path)),
    ("a pickle", lambda path, text: path.write_bytes(hostile.payload_bytes(path.with_name("proof")))),
]


@pytest.mark.parametrize("spoil", [case[1] for case in SCHEDULES], ids=[case[0] for case in SCHEDULES])
def test_a_hostile_schedule_of_a_checkpoint_is_rejected(spoil: Callable[[Path, str], object], tmp_path: Path) -> None:
    config, path = of_two_ranks(tmp_path), tmp_path / "schedule.json"
    text = to_json(build_schedule("1f1b", 2, config.num_micro_batches))
    path.write_text(text)
    assert read_schedule(path, config).num_ranks == 2
    spoil(path, text)
    rule = f"resume: {path} must be a valid schedule of 2 pipeline ranks"
    assert_refused(CheckpointError, [rule], lambda: read_schedule(path, config))
    assert not (tmp_path / "proof").exists()


PACKAGES = (
    "base",
    "comm",
    "data",
    "dualpipe",
    "evaluation",
    "infer",
    "kernels",
    "launch",
    "model",
    "planner",
    "score",
    "train",
    "verify",
)

PATTERNS = (
    r"\bc?[pP]ickle\b",
    r"\bdill\b",
    r"\bmarshal\b",
    r"\bshelve\b",
    r"\btorch\.load\b",
    r"\bweights_only=False\b",
    r"\ballow_pickle\b",
    r"\byaml\.(load|full_load|unsafe_load)\b",
    r"(?<![\w.])eval\(",
    r"(?<![\w.])exec\(",
    r"\bshell=True\b",
    r"\bos\.(system|popen)\b",
    r"\bdcp_load\(",
    r"\bDefaultLoadPlanner\(",
    r"\bFileSystemReader\(",
)

ALLOWED = {
    # A name in a path: torch writes this file, nothing here reads it.
    ("train/records/step_record.py", "pickle"),
    # With a loader that makes plain values alone and refuses aliases.
    ("launch/config/folder.py", "yaml.load"),
    ("data/mix/manifest.py", "yaml.load"),
    # Between ranks of one process group, as torch's collectives of objects do; never a file or a datagram.
    ("comm/agreement.py", "pickle"),
    # From this process to its child.
    ("planner/job_plan.py", "pickle"),
    # Plugin files that the command line or conf/ names, never one that a file of a run or a checkpoint does.
    ("base/registry.py", "exec("),
    # Generated programs and their tests, which run in the sandbox alone (tests/score/test_code.py).
    ("score/guest/candidate.py", "exec("),
    ("score/guest/script.py", "exec("),
    ("score/guest/tests.py", "exec("),
}


def uses(source: str) -> set[str]:
    """Returns each pattern's matches in a source's code, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    # A base class is written as a call would be.
    code = re.sub(r"class \w+\((\w+)\)", r"\1()", ast.unparse(tree))
    return {found.group() for pattern in PATTERNS for found in re.finditer(pattern, code)}


@pytest.mark.slow
def test_sources_run_nothing_that_a_file_holds() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = {(path.relative_to(ROOT).as_posix(), use) for path in files for use in uses(path.read_text("utf-8"))}
    assert found - ALLOWED == set(), "a use that is not listed"
    assert ALLOWED - found == set(), "listed, and no longer there"


def test_sources_a_use_is_found_and_a_word_in_a_docstring_is_none() -> None:
    for source, use in (
        ("from pickle import load", "pickle"),
        ("x = torch.load(path, weights_only=False)", "weights_only=False"),
        ("x = yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("x = eval (text)", "eval("),
        ("subprocess.run(x, shell = True)", "shell=True"),
    ):
        assert use in uses(source)
    assert uses('"""pickle"""\n# pickle\nmodel.eval()\nre.compile("a")') == set()

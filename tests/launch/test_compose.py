"""Overrides become plain values, and every error of composition, of weights and of memory is one line."""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from base.refusal import ConfigError
from data.corpus import DataError
from launch import train
from launch.config.compose import (
    _LIBRARY_ERRORS,
    _compose,
    _parse,
    chosen_options,
    compose,
    config_dir,
    default_groups,
    included_roots,
    key_of,
    own_keys,
    user_errors,
)
from launch.config.memory import check_memory
from launch.config.rules import check_rules
from launch.config.run import check, compose_run, read_config, write_config
from tests import ROOT
from tests.data.released_tokenizer import VOCAB_SIZE, write_released
from tests.launch.fuzz import SECONDS, invalid_configurations, misused_keys, problem_of, refusal_of
from tests.launch.test_config import build, place_weights
from tests.refusals import assert_refused
from train.checkpoint.locate import check_compatible
from train.checkpoint.manifest import CheckpointError, write_manifest
from train.config import TrainConfig, sized_config
from train.predict import memory as predict
from train.predict.fit import memory_lines
from train.predict.memory import predict_memory, ramp_memory_cap


def test_compose_gives_plain_values() -> None:
    values = compose("train", ["experiment=quickstart", "task.steps=7", "name=x"])
    assert values["task"]["steps"] == 7
    assert values["name"] == "x"
    assert values["parallelism"] == {"pipeline": 4, "data": 2, "expert": 2, "cut": "auto", "context": 1, "tensor": 1}
    assert type(values["parallelism"]) is dict
    assert compose("train", ["name=run-${seed}", "seed=5"])["name"] == "run-5"


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        ["seed=7", "experiment=two_nodes", "name=a-${seed}", "model=tiny", "optim/schedule=wsd", "seed=8"],
        [
            "+batch.new={a:1}",
            "+batch.new={b:[2]}",
            "++batch.new.a=3",
            "++batch.global_sequences=16",
            "profile.steps=[3]",
        ],
        ["batch={global_sequences:5}", "~seed", "~batch.micro_sequences", "data.kind=null"],
        ["~seed=5"],
        ["~absent"],
        ["+seed=1"],
        ["absent=1"],
        ["seed.a=1"],
        ["profile.steps.a=1"],
        ["name='${a'"],
    ],
    ids=" ".join,
)
def test_compose_equals_hydra(values: list[str]) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            expected = hydra_compose("train", values)
        except _LIBRARY_ERRORS:
            expected = None
    try:
        composed = _compose("train", [_parse(text) for text in values]).config
    except _LIBRARY_ERRORS:
        composed = None
    assert composed == expected


def test_compose_reads_a_file_again_that_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(config_dir(), tmp_path / "conf")
    monkeypatch.setattr("launch.config.compose.config_dir", lambda: tmp_path / "conf")
    saved = tmp_path / "conf" / "experiment" / "quickstart.yaml"
    assert compose("train", ["experiment=quickstart"])["name"] == "quickstart"
    saved.write_text(saved.read_text("utf-8").replace("name: quickstart", "name: edited"), "utf-8")
    assert compose("train", ["experiment=quickstart"])["name"] == "edited"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learing_rate=1", ["optim.learing_rate: unknown key", "did you mean optim.learning_rate"]),
        ("learning_rate=1", ["learning_rate: unknown key", "did you mean optim.learning_rate"]),
        ("stage.step=1", ["stage.step: unknown key", "did you mean task.steps"]),
        ("expermient=quickstart", ["expermient: unknown key", "did you mean experiment"]),
        ("data.paths=[a]", ["data.paths: unknown key", "data=files"]),
        ("optim.learning_rate.x=3", ["optim.learning_rate.x: unknown key"]),
        ("model=tinyy", ["model: no option tinyy", "did you mean tiny", "tiny, v2_236b"]),
        ("model={hidden_size:1}", ["model: no option", "tiny, v2_236b"]),
        ("model=null", ["model: no option null"]),
        ("model=tiny,quickstart", ["model: one run takes one value"]),
        ("seed=1,2", ["seed: one run takes one value", "1,2"]),
        ("seed=range(3)", ["seed: one run takes one value"]),
        ("~model", ["~model", "model=option"]),
        ("+model=tiny", ["+model=tiny", "model=option"]),
        ("model@other=tiny", ["model@other", "model=option"]),
        ("data=files", ["data.paths: a value is needed"]),
        ("task.steps=???", ["task.steps: a value is needed"]),
        ("name=${nope}", ["name: ", "nope"]),
        ("name=${oc.env:NOT_SET_ANYWHERE}", ["name: ", "NOT_SET_ANYWHERE"]),
        ("seed", ["seed: is not an override", "name=value"]),
        ("=3", ["=3: is not an override"]),
        ("seed=[1", ["seed=[1: is not an override", "quote"]),
        ("", ["is not an override"]),
        ("reward=exact reward.parts.path=x", ["reward.parts.path: reward.parts is a list", "reward.parts.0.weight"]),
        ("reward=exact +reward.parts.path=x", ["reward.parts.path: reward.parts is a list", "reward.parts.0.weight"]),
        ("reward=exact reward.parts.5.weight=x", ["reward.parts.5.weight: reward.parts is a list", "parts.0.weight"]),
        ("reward.parts.path=x", ["reward.parts.path: needs reward, which is null", "reward=exact"]),
        ("recompute.x=1", ["recompute.x: recompute is a list", "is x", "recompute.0"]),
        ("seed.0=1", ["seed.0: unknown key, as seed is one value", "nearest valid: seed="]),
        ("plan=[1]", ["plan: must hold keys and values, is [1]", "nearest valid: plan.check="]),
        ("~seed=5", ["~seed=5: must name", "is 5", "nearest valid: seed=0"]),
        ("~seed seed=1", ["seed: must be a key that exists, is none after the overrides before it"]),
        ("~data.paths data=files", ["~data.paths: must name", "nearest valid: data.paths=..."]),
        ("name='${seed'", ["name: must close what it opens with ${", "nearest valid: name=${name}"]),
        ("name=${name}", ["name: must refer to a value that exists, is itself"]),
        ("name=${out_dir} out_dir=${nope}", ["out_dir: must refer to a key that exists, is ${nope}"]),
        ("name=${foo:bar}", ["name: must refer to a value that exists, is ${foo:bar}"]),
        (
            "name=${rollout.samples}",
            ["rollout: must have values, because name has ${rollout.samples}, is null", "default"],
        ),
        ("task=distill data=files", ["data.paths and task.teacher: a value is needed; write data.paths=["]),
        ("hydra.run.dir=x", ["hydra.run.dir", "no effect"]),
        ("hydra/launcher=x", ["hydra/launcher", "no effect"]),
    ],
)
def test_compose_rejects_and_names_the_nearest(override: str, parts: list[str]) -> None:
    text = assert_refused(ConfigError, parts, lambda: compose("train", override.split(" ")))
    assert not re.search("override |struct|raised|Interpolation|config\\.|Error", text)


def test_compose_submit_takes_over_training_with_its_own_cluster() -> None:
    ours = compose("submit", [])
    assert {key: ours[key] for key in ours if key not in own_keys("submit")} == compose("train", ["cluster=slurm"])
    assert set(own_keys("submit")) == {"dry_run", "slurm", "verify"}
    assert default_groups("submit") == {**default_groups("train"), "cluster": "slurm"}
    assert included_roots("submit") == ["train"]


def test_compose_key_of_an_override() -> None:
    assert [key_of(text) for text in ("a.b=[1,2]", "+c=1", "~d")] == ["a.b", "c", "d"]


def test_compose_rejects_a_group_of_another_command() -> None:
    with pytest.raises(ConfigError, match=r"^model: unknown key"):
        compose("schedule", ["model=tiny"])


def test_compose_a_task_brings_what_it_demands() -> None:
    values = compose("train", ["task=grpo"])
    assert values["rollout"]["max_new_tokens"] < values["batch"]["sequence_length_tokens"]
    for task in ("sft", "dpo", "reward_model", "grpo"):
        batch = compose("train", [f"task={task}"])["batch"]
        assert batch["document_mask"]
        assert chosen_options("train", [f"task={task}"])["batch"] == "samples"
    assert compose("train", ["task=sft", "batch=default"])["batch"]["document_mask"] is False


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["task=grpo"], ["reward", "data.kind", "init_from"]),
        (["task=grpo", "data=problems"], ["data.paths", "reward", "init_from"]),
        (["task=dpo"], ["data.kind", "init_from"]),
        (["task=distill", "name=a/b"], ["task.teacher", "name", "data.kind", "init_from"]),
        (["task=dpo", "name=a/b", "batch.global_sequences=7", "profile.steps=[0]", "task.steps=3"],
         ["name", "batch.global_sequences", "profile.steps", "data.kind", "init_from"]),
    ],
)  # fmt: skip
def test_one_message_names_all_that_a_run_lacks(overrides: list[str], keys: list[str]) -> None:
    parts = assert_refused(ConfigError, (), lambda: check(compose_run(overrides))).split(". Also ")
    assert [part.partition(":")[0] for part in parts] == keys
    assert all("; " in part for part in parts)


TEXTS = ["def f(x):\n    return x + 1\n"] * 9


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Creates converted weights with a tokenizer, with only the files that these tests need."""
    folder = Path(place_weights(tmp_path / "weights"))
    write_released(folder / "tokenizer.json", TEXTS)
    return folder


def place_checkpoint(run: Path, config: TrainConfig) -> Path:
    folder = run / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    write_released(folder / "tokenizer.json", TEXTS)
    write_manifest(folder, 5, config, "f00d")
    return folder


def chosen(*overrides: str) -> str | None:
    config = build(*overrides)
    assert read_config(write_config(config)) == config
    return config.data.tokenizer


def test_tokenizer_of_the_weights_is_taken_unless_another_is_named(weights: Path, tmp_path: Path) -> None:
    own = str(weights / "tokenizer.json")
    assert chosen() is None
    assert chosen(f"init_from={weights}") == own
    assert chosen(f"init_from={weights}", "data.tokenizer=null") is None
    other = write_released(tmp_path / "other.json", TEXTS)
    assert chosen(f"init_from={weights}", f"data.tokenizer={other}") == str(other)
    assert chosen(f"data.tokenizer={weights}") == own
    (weights / "tokenizer.json").unlink()
    assert chosen(f"init_from={weights}") is None


def test_tokenizer_of_a_run_is_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    own = str(place_checkpoint(tmp_path / "run", build()) / "tokenizer.json")
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000005", own):
        assert chosen(f"data.tokenizer={place}") == own
    assert chosen(f"init_from={tmp_path / 'run'}") == own


def test_tokenizer_of_a_resumed_run_is_the_given_one(weights: Path, tmp_path: Path) -> None:
    given, trained = build(f"init_from={weights}"), build()
    own = place_checkpoint(tmp_path / "given", replace(given, init_from=None)) / "tokenizer.json"
    place_checkpoint(tmp_path / "trained", trained)
    for name, tokenizer in (("given", str(own)), ("trained", None)):
        config = build(f"resume={tmp_path / name}")
        assert config.data.tokenizer == tokenizer
        check_compatible(tmp_path / name / "checkpoints" / "step-00000005", config)
    # What was ignored before may differ now.
    check_compatible(own.parent, build(f"resume={tmp_path / 'given'}", "data.tokenizer_vocab_size=300"))
    with pytest.raises(CheckpointError, match=r"data\.tokenizer is given there and None here"):
        check_compatible(own.parent, build(f"resume={tmp_path / 'given'}", "data.tokenizer=null"))


def test_tokenizer_must_fit_the_model(weights: Path) -> None:
    choices = ("data.tokenizer_vocab_size=99999", "task.steps=1")  # the size is ignored
    check(replace(build(f"init_from={weights}", f"model.vocab_size={VOCAB_SIZE}", *choices), init_from=None))
    parts = ("data.tokenizer: must have at most model.vocab_size=2048", f"has {VOCAB_SIZE}", "data.tokenizer=null")
    assert_refused(ConfigError, parts, lambda: check(build(f"data.tokenizer={weights}", *choices)))


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("absent.json", ["data.tokenizer: must be auto, null", "absent.json", "nearest valid: auto"]),
        ("weights/tokeniser.json", ["did you mean tokenizer.json"]),
        ("empty", ["data.tokenizer: ", "must hold a tokenizer.json, holds none"]),
        ("", ["data.tokenizer: must be auto, null", "is ''"]),
    ],
)
def test_tokenizer_that_is_not_there_is_rejected(place: str, parts: list[str], weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(ConfigError, parts, lambda: build(f"data.tokenizer={tmp_path / place if place else ''}"))


def test_tokenizer_that_is_none_is_rejected(weights: Path) -> None:
    (weights / "tokenizer.json").write_text("{}")
    for choice in ("init_from", "data.tokenizer"):
        with pytest.raises(DataError, match=r"^data\.tokenizer: .*must be a saved tokenizer"):
            check(build(f"{choice}={weights}"))
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: must be text"):
        build("data.tokenizer=3")


@pytest.mark.long
@pytest.mark.parametrize("number", [40, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_invalid_configurations_are_rejected_by_name(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "start_fork_server", lambda *_: pytest.fail("a process was about to start"))
    for invalid in islice(invalid_configurations(seed=0), number):
        with pytest.raises(user_errors()) as refused:
            train.main(invalid.overrides)
        assert problem_of(invalid, f"error: {refused.value}\n") == "", (invalid, str(refused.value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "command"), enumerate(path.stem for path in sorted(config_dir().glob("*.yaml"))))
@pytest.mark.parametrize(
    "every", [pytest.param(6, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.exhaustive)]
)
def test_no_library_speaks_to_the_user_of_a_command(command: str, first: int, every: int) -> None:
    """Each kind of misuse is tried with one command in six, or with every command."""
    for invalid in islice(misused_keys(command, seed=0), first % every, 40, every):
        with pytest.raises(ConfigError) as refused:
            compose(command, invalid.overrides)
        assert problem_of(invalid, f"error: {refused.value}\n") == "", (invalid, str(refused.value))


@pytest.mark.slow
def test_the_command_rejects_invalid_configurations_soon(tmp_path: Path) -> None:
    for invalid in islice(invalid_configurations(seed=1), 3):
        done, seconds = refusal_of(invalid, tmp_path)
        assert done.returncode == 2, done.stderr
        assert problem_of(invalid, done.stderr) == ""
        assert seconds < SECONDS
    assert list(tmp_path.iterdir()) == []


V3 = (
    "model=v3_671b",
    "cluster=h800",
    "parallelism=v3_2048_ranks",
    "precision=fp8",
    "optim=adamw_v3",
    "dispatch=two_hop",
    "batch.sequence_length_tokens=4096",
    "batch.global_sequences=15360",
    "validation.sequences=0",
    "batch.micro_sequences=1",
)

RAMP = "batch.ramp={start_sequences:3072,end_tokens:469000000000,num_sizes:5}"


def make_config(*overrides: str) -> TrainConfig:
    return compose_run(overrides)


def refusal(config: TrainConfig) -> str:
    return assert_refused(ConfigError, (), lambda: check_memory(config, check_rules))


@pytest.mark.slow
def test_deepseek_v3_fits_80_gb_with_one_sequence_and_not_with_two() -> None:
    check_memory(make_config(*V3), check_rules)
    message = refusal(make_config(*V3, "batch.micro_sequences=2"))
    assert message.startswith("memory: rank 1 needs 126.5 GB of 84.9 (activations 86.5, ")
    assert message.endswith("; nearest: batch.micro_sequences=1")


@pytest.mark.exhaustive
def test_deepseek_v3_at_128k_names_the_ranks_that_must_share_a_sequence() -> None:
    message = refusal(make_config(*V3, "batch.sequence_length_tokens=131072"))
    assert re.match(r"memory: rank \d+ needs 16\d\d\.\d GB of 84\.9 \(activations 1456\.3, ", message), message
    nearest = message.rpartition("; nearest: ")[2].split()
    assert any(text.startswith("parallelism.context=") for text in nearest), message
    check_memory(make_config(*V3, "batch.sequence_length_tokens=131072", *nearest), check_rules)


def forget() -> None:
    """Makes this process predict again, as a new one does."""
    for predicted in (predict._measured, predict_memory, predict._predict):
        predicted.cache_clear()


MEMORY_OF = (
    "import sys, time; sys.modules |= {'triton': None} if sys.argv[1] == 'no triton' else {}; "
    "from launch.config.run import compose_run; "
    "from train.predict.fit import memory_lines; config = compose_run(sys.argv[2:]); "
    "start = time.process_time(); lines = memory_lines(config); "
    "print(time.process_time() - start, 'torch' in sys.modules, lines)"
)


def predict_alone(cache: Path, *overrides: str, has_triton: bool = True) -> list[str]:
    """Returns CPU seconds, whether torch was imported, and the lines of a prediction by a new process."""
    triton = "triton" if has_triton else "no triton"
    command = [sys.executable, "-c", MEMORY_OF, triton, *overrides, f"data.cache_dir={cache}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split(maxsplit=2)


@pytest.mark.slow
def test_deepseek_v3_is_measured_once_and_takes_less_than_two_seconds_and_no_torch_then(tmp_path: Path) -> None:
    """A machine without Triton measures the same."""
    forget()
    measured = str(memory_lines(make_config(*V3, f"data.cache_dir={tmp_path}")))
    seconds, has_torch, read = predict_alone(tmp_path, *V3)
    assert float(seconds) < 2
    assert has_torch == "False"
    assert read.rstrip() == measured
    assert predict_alone(tmp_path / "without", *V3, has_triton=False)[1:] == ["True", read]


@pytest.mark.slow
def test_sizes_that_were_cut_or_changed_are_measured_again(tmp_path: Path) -> None:
    config = make_config("model=quickstart", f"data.cache_dir={tmp_path}")
    forget()
    lines = memory_lines(config)
    files = sorted((tmp_path / "sizes").iterdir())
    whole = [file.read_text() for file in files]
    changes = ("[[]]", "[]", "[[", "0\n[[]]", "null", "\n\n", '[[{"kept": 5}]]')
    for first in (0, 3):
        for file, change in zip(files, changes[first:], strict=False):
            file.write_text(change)
        forget()
        assert memory_lines(config) == lines
        assert [file.read_text() for file in files] == whole


@pytest.mark.slow
def test_the_start_of_a_ramp_is_scheduled_so_that_it_fits() -> None:
    """With fewer than two micro-batches per rank, more W operations are deferred, which needs 81 GB on rank 0."""
    config = make_config(*V3, RAMP)
    first = sized_config(config, 3072)
    assert 80e9 < predict_memory(first).worst.total < 84e9
    larger = replace(first, cluster=replace(first.cluster, memory_bytes=90_000_000_000))
    assert ramp_memory_cap(larger) is None
    # A cap costs little, so a size takes at most 95 % of the memory if one allows that.
    assert predict_memory(replace(first, memory_cap=ramp_memory_cap(first))).worst.total <= 0.95 * 84.9e9
    smaller = replace(first, cluster=replace(first.cluster, memory_bytes=75_000_000_000))
    cap = ramp_memory_cap(smaller)
    assert cap is not None
    assert predict_memory(replace(smaller, memory_cap=cap)).worst.total <= 75e9
    check_memory(config, check_rules)


def test_without_memory_bytes_nothing_is_checked() -> None:
    config = make_config(*V3, "batch.micro_sequences=2", "cluster.memory_bytes=null")
    started = time.process_time()
    check_memory(config, check_rules)
    assert time.process_time() - started < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "overrides", "nearest"),
    [
        (
            0.99,
            ("recompute=[norm]", "batch.micro_sequences=1", "batch.sequence_length_tokens=1024"),
            "recompute=[norm,mla_up,swiglu]",
        ),
        (0.95, ("precision=bf16", "batch.micro_sequences=1"), "optim.moments=bf16"),
        (0.5, ("batch.micro_sequences=1",), "none; closest "),
    ],
)
def test_nearest_changes_are_computed(share: float, overrides: tuple[str, ...], nearest: str) -> None:
    """Each suggested change is predicted again and fits."""
    config = make_config("model=quickstart", "parallelism.cut=even", *overrides)
    needed = predict_memory(config).worst.total
    tight = replace(config, cluster=replace(config.cluster, memory_bytes=round(needed * share)))
    assert f"nearest: {nearest}" in refusal(tight)


def test_a_nearest_change_passes_when_it_is_made() -> None:
    config = make_config("model=quickstart", "batch.micro_sequences=4", "cluster.memory_bytes=200000000")
    text = refusal(config).partition("nearest: ")[2]
    again = make_config("model=quickstart", "batch.micro_sequences=4", "cluster.memory_bytes=200000000", text)
    check_memory(again, check_rules)


def test_a_reserve_as_large_as_the_memory_is_rejected() -> None:
    message = refusal(make_config("cluster.memory_bytes=1000", "cluster.memory_reserve_bytes=1000"))
    assert message.startswith("cluster.memory_reserve_bytes: must be below cluster.memory_bytes=1000, is 1000; nearest")


def test_the_table_has_a_row_for_each_rank() -> None:
    lines = memory_lines(make_config("experiment=two_nodes"))
    assert lines[0].startswith("memory: rank ")
    assert [line.split()[0] for line in lines[2:6]] == ["0", "1", "2", "3"]
    assert lines[-1].startswith("experts are taken to receive equally many rows; 10 % more")

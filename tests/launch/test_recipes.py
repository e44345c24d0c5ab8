"""Tests of the recipes in conf/experiment: each passes all checks, and its values equal those of its source."""

import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml

from base.refusal import ConfigError
from data.config import BatchRamp
from data.corpus import DataError
from launch import plan, submit
from launch.config.compose import compose, dotted_keys, options
from launch.config.folder import write_run_folder
from launch.config.memory import check_memory
from launch.config.rules import check_rules
from launch.config.run import check, check_data, check_text, compose_run, write_config
from launch.plan_request import read_request
from launch.train import preview
from model.config import YarnRope
from tests.covering import exhaustive
from tests.data.released_tokenizer import write_released
from tests.docs.pages import write_prepared
from tests.launch.checkpoints import write_stand_in
from tests.launch.test_submit import place_sbatch
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.sources import scoring_runs
from train.config import TrainConfig
from train.core.step import rates_of
from train.optim.learning_rate import schedule_warnings
from train.predict.cut import run_cut, run_placement
from train.predict.layer_times import nominal_times, stage_costs
from train.start.corpus import prepare_corpus
from train.tasks.grpo import GrpoConfig

# What a recipe leaves to its user: ranks, nodes, tokens it trains on, and the vocabulary of the tokenizer to give.
LAPTOP = ("quickstart", "quickstart_muon", "two_nodes", "four_nodes", "arithmetic_sft", "arithmetic_distill")
ON_PAIRS = ("arithmetic_rm", "arithmetic_dpo")
ON_REWARDS = ("arithmetic_grpo", "arithmetic_self_reward")
GIVEN = {
    "v3_671b": 129_280,
    "moonlight_16b": 163_840,
    "v2_lite_16b": 102_400,
    "glm_flash_30b": 154_880,
    "qwen3_30b": 151_936,
    "mlperf_v3": 128_256,
}
SIZES = {
    "v3_671b": (2048, 256, 14_800 * 10**9),
    "moonlight_16b": (8, 1, 100 * 10**9),
    "glm_flash_30b": (8, 1, 100 * 10**9),
    "qwen3_30b": (8, 1, 100 * 10**9),
    "v2_lite_16b": (16, 2, 200 * 10**9),
    "ladder_1b": (8, 1, 20 * 10**9),
    "ladder_100m": (1, 1, 2 * 10**9),
}
EXTENSIONS = ("v3_32k", "v3_128k")
PHASES_OF_V3 = (*EXTENSIONS, "v3_sft", "v3_grpo")
SAME_RUNS = (
    "quickstart",
    "two_nodes",
    "arithmetic_sft",
    "arithmetic_grpo",
    "quickstart_yarn",
    "quickstart_mix",
    "v3_671b",
    "v2_lite_16b",
)
"""Recipes that differ in how their steps, chunks, weights and tokenizer come about."""
T = 10**12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "text").mkdir()
    # Real text as far as a start reads it; the rest is sparse.
    (folder / "text" / "a.txt").write_text("some text to train on\n" * 400_000, encoding="utf-8")
    os.truncate(folder / "text" / "a.txt", 3 * T)  # sparse: as many bytes as DeepSeek-V3's corpus needs at least
    manifest = "dedup: {kind: minhash}\nfilters: {}\nsources: [{name: web, paths: [text], weight: 1}]\n"
    (folder / "v3.yaml").write_text(manifest, "utf-8")
    write_stand_in(folder / "teacher", compose_run(["model=arithmetic"]).model)
    for name, size in GIVEN.items():
        write_released(folder / f"{name}.json", ["some text to train on"], highest_id=size - 1)
    return folder


def build(folder: Path, name: str, *overrides: str) -> TrainConfig:
    """Returns the overrides of a recipe, with placeholders for the values that the user must set."""
    paths = [] if name in LAPTOP else [f"data.paths=[{folder / 'text'}]"]
    if name == "v3_671b":
        paths = [f"data.manifest={folder / 'v3.yaml'}"]
    given = [f"data.tokenizer={folder / name}.json"] if name in GIVEN else []
    given += [f"task.teacher={folder / 'teacher'}"] if name == "arithmetic_distill" else []
    return compose_run([f"experiment={name}", *paths, *given, *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ON_PAIRS, *ON_REWARDS])
def test_recipe_after_fine_tuning_starts_from_random_weights_only_if_told(name: str, tmp_path: Path) -> None:
    config = compose_run([f"experiment={name}", "init_from=random"])
    check(config)
    assert config.model.head == ("score" if name == "arithmetic_rm" else "tokens")
    assert config.name == name
    unstarted = replace(config, init_from=None)
    for refused in (unstarted, replace(unstarted, resume="auto", out_dir=str(tmp_path))):
        with pytest.raises(ConfigError, match=r"^init_from: must name trained .*init_from=random, which confirms"):
            check(refused)
    check(unstarted, checks_weights=False)
    assert read_request([f"experiment={name}"]).config.init_from is None


@pytest.mark.parametrize("name", [*ON_REWARDS, "v3_grpo"])
def test_a_chosen_loss_keeps_nothing_of_the_loss_of_its_recipe(name: str) -> None:
    """Neither the divergence nor its weight, which no line would show."""
    given = ["data.paths=[a]", "data.tokenizer=null"] if name == "v3_grpo" else []
    composed = compose("train", [f"experiment={name}", *given, "task/loss=v3"])
    assert composed["task"]["loss"] == compose("train", ["task=grpo", "task/loss=v3"])["task"]["loss"]


def test_recipe_distils_into_a_fresh_student_and_says_so(folder: Path) -> None:
    student = build(folder, "arithmetic_distill")
    assert (student.init_from, student.initial_weights) == ("random", None)
    with pytest.raises(ConfigError, match=r"^init_from: must name trained weights with task=distill, is null"):
        check(build(folder, "arithmetic_distill", "init_from=null"))


def test_arithmetic_v3_rl_passes_the_whole_check(folder: Path) -> None:
    """Each of its domains has a judge, and its loss is that of equations 26 to 28."""
    given = ["experiment=arithmetic_v3_rl", "init_from=random", *small_reward_model(folder)]
    config = compose_run(given)
    check(config)
    assert isinstance(config.task, GrpoConfig)
    assert (config.task.loss.ratio, config.task.loss.kl) == ("sequence_product", "forward_answer")


@pytest.mark.slow
def test_v3_rl_is_planned_with_a_reward_model_of_the_sizes_of_the_policy() -> None:
    request = read_request(["experiment=v3_rl"])
    assert request.notes == ("reward.parts: a reward model without a ckpt is planned with the sizes of the policy",)
    (second,) = scoring_runs(request.config)
    assert second.model == replace(request.config.model, head="score", mtp_depth=0)
    with pytest.raises(ConfigError, match=r"^data.sources and reward.parts.2.ckpt: a value is needed"):
        compose_run(["experiment=v3_rl"])


def test_a_folder_that_is_called_random_has_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("random").mkdir()
    write_stand_in(Path("random"), compose_run(["model=tiny"]).model)
    named = compose_run(["model=of_checkpoint", "init_from=./random"])
    assert (named.model, named.initial_weights) == (compose_run(["model=tiny"]).model, "./random")
    with pytest.raises(ConfigError, match=r"of_checkpoint reads .* from init_from, which names no weights"):
        compose_run(["model=of_checkpoint", "init_from=random"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAPTOP, *SIZES])
def test_recipe_passes_the_whole_check(folder: Path, name: str) -> None:
    config = build(folder, name)
    check(config)
    assert not schedule_warnings(config.optim, config.batch_sizes, config.task.steps)
    assert config.name == name
    assert config.num_micro_batches >= 2 * config.parallelism.pipeline


@pytest.mark.parametrize("name", [*SIZES])
def test_recipe_for_gpus_is_a_real_run(folder: Path, name: str) -> None:
    """Large recipes keep no default that is meant for a hundred steps on a laptop."""
    config = build(folder, name)
    task, (ranks, nodes, tokens) = config.task, SIZES[name]
    assert config.parallelism.world_size == ranks
    assert ranks // config.cluster.ranks_per_node == nodes
    before, after = (config.batch_sizes.tokens_before(steps) for steps in (task.steps - 1, task.steps))
    assert before < tokens <= after
    assert task.bias_update_rate.at(0) == (0 if name == "qwen3_30b" else 1e-3)  # its files hold no biases
    assert config.validation.every_steps >= 500
    assert config.checkpointing.every_steps >= 500
    assert config.batch.sequence_length_tokens >= 2048
    assert config.cluster.device == "cuda"
    assert config.cluster.memory_bytes is not None


def test_recipe_v3_reads_a_prepared_mixture_with_its_split(folder: Path, tmp_path: Path) -> None:
    given = ["experiment=v3_671b", f"data.folder={tmp_path / 'tokens'}"]
    prepare = r"python -m launch\.prepare data\.manifest=MIX\.yaml out="
    with pytest.raises(DataError, match=rf"^data\.folder: a value is needed .*{prepare}FOLDER"):
        check_data(compose_run(given[:1]))
    with pytest.raises(DataError, match=rf"^data\.folder: .* has no readable prepare\.json; nearest: {prepare}"):
        check_data(compose_run(given))
    write_prepared(tmp_path / "tokens", folder / "v3_671b.json", 129_280)
    assert check_data(compose_run(given)) == 129_280
    with pytest.raises(DataError, match=r"^data\.punctuation_newline_split: .*, is 0\.1; nearest: 0\.05, or null$"):
        check_data(compose_run([*given, "data.punctuation_newline_split=0.1"]))


@pytest.mark.parametrize(("name", "keys"), [("v3_32k", ("paths", "tokenizer")), ("ladder_1b", ("paths",))])
def test_recipe_says_what_its_user_must_give(folder: Path, name: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        given = [f"data.{other}=[{folder / 'text'}]" for other in keys if other != key]
        with pytest.raises(ConfigError, match=rf"^data\.{key}: a value is needed; write data\.{key}=.*(text|tokens)"):
            compose("train", [f"experiment={name}", *given])


def test_recipe_v3_is_the_published_run(folder: Path) -> None:
    """The values equal those of arXiv:2412.19437, sections 3 and 4.2."""
    config = build(folder, "v3_671b")
    task, batch = config.task, config.batch
    model, optim, mesh = config.model, config.optim, config.parallelism
    assert (mesh.pipeline, mesh.data, mesh.expert, mesh.world_size) == (16, 128, 64, 2048)
    assert (config.dispatch.kind, config.dispatch.payload, config.precision.kind) == ("two_hop", "fp8", "fp8")
    assert config.schedule.kind.startswith("dualpipe")
    adam = (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm, optim.moments)
    assert adam == (0.9, 0.95, 0.1, 1.0, "bf16")
    assert (model.rope_scaling.kind, model.max_position_tokens, model.initializer_range) == ("plain", 4096, 0.006)
    assert (batch.sequence_length_tokens, batch.micro_sequences, batch.document_mask) == (4096, 1, False)
    assert task.balance_loss_weight == 1e-4
    assert (config.data.fim_rate, config.data.punctuation_newline_split) == (0.1, 0.05)
    assert batch.ramp == BatchRamp(start_sequences=3072, end_tokens=469 * 10**9, num_sizes=5)
    sizes = config.batch_sizes
    assert (sizes.sequences(0), sizes.sequences(task.steps - 1)) == (3072, 15_360)
    assert [sizes.tokens_before(task.steps) // 10**9, task.steps] == [14_800, 247_199]
    # The learning rate, the MTP loss weight and the router bias rate just before and after each change, by tokens.
    steps = {at: next(s for s in range(at // (15_360 * 4096), task.steps) if sizes.tokens_before(s) >= at) for at in (
        5 * T, 10 * T, 1215 * T // 100, 143 * T // 10, 145 * T // 10, 14_633 * 10**9)}  # fmt: skip
    seen = {at: rates_of(config.task, config.optim, sizes, step) for at, step in steps.items()}
    published = {5: 2.2e-4, 10: 2.2e-4, 12.15: 1.21e-4, 14.3: 2.2e-5, 14.5: 2.2e-5, 14.633: 7.3e-6}
    assert {at / T: each.learning_rate for at, each in seen.items()} == pytest.approx(published, rel=1e-4)
    assert rates_of(config.task, config.optim, sizes, 1999).learning_rate == 2.2e-4
    assert [each.mtp_loss_weight for each in seen.values()] == [0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert [each.bias_update for each in seen.values()] == [1e-3, 1e-3, 1e-3, 0, 0, 0]
    before = [rates_of(config.task, config.optim, sizes, steps[at] - 1) for at in (10 * T, 143 * T // 10)]
    assert (before[0].mtp_loss_weight, before[1].bias_update) == (0.3, 1e-3)


def test_recipe_v3_model_is_the_released_one_without_yarn(folder: Path) -> None:
    released = compose_run(["model=v3_671b"]).model
    pretrained = build(folder, "v3_671b").model
    same = {"rope_scaling": released.rope_scaling, "max_position_tokens": released.max_position_tokens}
    assert released.rope_scaling.kind == "yarn"
    assert replace(pretrained, **same) == released  # type: ignore[arg-type]


def weights_before(folder: Path, name: str) -> Path:
    """Returns weights of the phase before an extension, of which only the architecture is there."""
    model = {"v3_32k": "v3_671b_4k", "v3_128k": "v3_671b", "quickstart_yarn": "quickstart"}[name]
    if not (weights := folder / f"before_{name}").exists():
        weights.mkdir()
        write_stand_in(weights, compose_run([f"model={model}"]).model)
    return weights


def extension(folder: Path, name: str) -> TrainConfig:
    """Returns an extension of V3 from weights of the phase before."""
    weights = weights_before(folder, name)
    given = [f"data.paths=[{folder / 'text'}]", f"data.tokenizer={folder / 'v3_671b'}.json"]
    return compose_run([f"experiment={name}", f"init_from={weights}", *given])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *SAME_RUNS,
        *(pytest.param(name, marks=pytest.mark.long) for name in (*PHASES_OF_V3, "v3_sft interleaved")),
        *exhaustive(*(name for name in options("experiment") if name not in (*SAME_RUNS, *PHASES_OF_V3, "none"))),
    ],
)
def test_recipe_is_the_same_run_for_train_plan_and_submit(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three write the same `config.yaml`, with the steps of epochs and the chunks of a schedule filled in."""
    overrides = overrides_of_run(folder, name, tmp_path)
    submitted = written_by_submit(overrides, tmp_path, monkeypatch)
    job = (tmp_path / "run" / "overrides.txt").read_text("utf-8").splitlines()
    trained = write_run_folder(compose_run(job), datetime.now())
    expected = dict(dotted_keys(yaml.safe_load((Path(trained.out_dir) / "config.yaml").read_text("utf-8"))))
    for command, values in {"plan": write_config(read_request(job).config), "submit": submitted}.items():
        composed = dict(dotted_keys(yaml.safe_load(yaml.safe_dump(values))))  # lists in place of tuples
        differing = {key for key in expected | composed if composed.get(key, ...) != expected.get(key, ...)}
        assert not differing, f"{command}: {sorted(differing)}"
    assert type(expected["task.steps"]) is int
    assert expected["task.steps"] < 2**40


def small_reward_model(folder: Path) -> list[str]:
    model = replace(compose_run(["model=arithmetic"]).model, head="score", mtp_depth=0)
    return [f"reward.parts.2.ckpt={write_stand_in(folder / 'small_judge', model)}"]


def overrides_of_run(folder: Path, name: str, tmp_path: Path) -> list[str]:
    """Returns the overrides of a recipe with stand-ins for all that its user must give."""
    name, _, variant = name.partition(" ")
    overrides = [f"experiment={name}", f"out_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    overrides += ["schedule=dualpipe_interleaved", "parallelism.pipeline=4", "parallelism.data=128"] if variant else []
    if name in ("v3_sft", "v3_grpo"):
        source = {
            "v3_sft": '{"prompt": "question %d", "answer": "answer"}',
            "v3_grpo": '{"prompt": "%d", "answer": "1"}',
        }
        lines = "\n".join(source[name] % number for number in range(2000))
        (tmp_path / "samples.jsonl").write_text(lines, "utf-8")
        given = [f"data.paths=[{tmp_path / 'samples.jsonl'}]", "data.tokenizer=null", "validation.sequences=0"]
        given += ["init_from=random"] if name == "v3_grpo" else []
        return [*overrides, *given]
    if name == "v3_rl":
        lines = "\n".join(f'{{"prompt": "{number}", "answer": "1", "tests": ["1"]}}' for number in range(300))
        sources = []
        for domain in ("maths", "code", "writing"):
            (tmp_path / f"{domain}.jsonl").write_text(lines, "utf-8")
            path = tmp_path / f"{domain}.jsonl"
            sources.append(f"{{name: {domain}, paths: [{path}], weight: 1, domain: {domain}}}")
        judge = replace(compose_run(["model=v3_671b"]).model, head="score", mtp_depth=0)
        given = [f"data.sources=[{','.join(sources)}]", "data.tokenizer=null", "validation.sequences=0"]
        given += [f"reward.parts.2.ckpt={write_stand_in(folder / 'judge', judge)}", "init_from=random"]
        return [*overrides, *given]
    if name == "quickstart_mix":
        text = "sources: [{name: one, paths: [text], weight: 1}, {name: two, paths: [text/a.txt], weight: 2}]"
        (folder / "MIX.yaml").write_text(text, encoding="utf-8")
        overrides.append(f"data.manifest={folder / 'MIX.yaml'}")
    elif name == "v3_671b":
        overrides.append(f"data.manifest={folder / 'v3.yaml'}")
    elif name == "arithmetic_v3_rl":
        overrides += [*small_reward_model(folder), "init_from=random"]
    elif name not in (*LAPTOP, *ON_PAIRS, *ON_REWARDS, "quickstart_yarn"):
        overrides.append(f"data.paths=[{folder / 'text'}]")
    if name in GIVEN or name in EXTENSIONS:
        overrides.append(f"data.tokenizer={folder / (name if name in GIVEN else 'v3_671b')}.json")
    if name in (*EXTENSIONS, "quickstart_yarn"):
        overrides.append(f"init_from={weights_before(folder, name)}")
    if name == "arithmetic_distill":
        overrides.append(f"task.teacher={folder / 'teacher'}")
    if name in (*ON_PAIRS, *ON_REWARDS, "mlperf_v3"):
        overrides.append("init_from=random")
    return overrides


def written_by_submit(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Returns the values of the `config.yaml` that launch.submit writes, without checks, predictions and Slurm."""
    place_sbatch(tmp_path, monkeypatch)
    monkeypatch.setattr(submit, "check", lambda config: None)
    monkeypatch.setattr(submit, "plan_job", MagicMock())
    monkeypatch.setattr(submit, "render", lambda *arguments: "")
    monkeypatch.setattr(submit, "predicted_lines", lambda *arguments: ())
    assert submit.main(overrides) == 0
    return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text("utf-8"))


def test_recipe_with_a_small_tokenizer_or_corpus_must_be_confirmed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that starts or plans a run checks both. Memory, which takes seconds, is checked elsewhere."""
    (tmp_path / "a.txt").write_text("A line of text for a corpus.\n" * 1400, "utf-8")
    small = write_released(tmp_path / "small.json", ["A line of text"], highest_id=100_000)
    given = ["experiment=v3_671b", "data=files_and_tokenizer", f"data.paths=[{tmp_path / 'a.txt'}]"]
    monkeypatch.setattr("launch.config.run.check_memory", lambda config, check: None)
    monkeypatch.setattr(plan, "plan_job", lambda *arguments: pytest.fail("is planned"))
    rule = "must have tokens for at least 90 % of model.vocab_size=129280, as other rows learn nothing"
    for run in (preview, plan.main, submit.main):
        for tokenizer, key, size, nearest in (
            ("null", "data.tokenizer_vocab_size", 4096, "data.tokenizer_vocab_size=129280"),
            (small, "data.tokenizer", 100_001, "data.tokenizer=PATH of another"),
        ):
            remedy = f"nearest valid: {nearest}, model.vocab_size={size}, or accept=[small_tokenizer]"
            with pytest.raises(ConfigError, match=f"^{re.escape(f'{key}: {rule}, has {size}; {remedy}')}$"):
                run([*given, f"data.tokenizer={tokenizer}", "accept=[repeated_corpus]"])
        many = r"a run must read its corpus at most 100 times, task.steps=247199 reads about [\d,]+ tokens [\d,]+ times"
        with pytest.raises(DataError, match=rf"^data.paths: .*: {many}; nearest valid: more text, or accept=.repeated"):
            run([*given, f"data.tokenizer={folder / 'v3_671b.json'}", "accept=[small_tokenizer]"])
    check(compose_run([*given, f"data.tokenizer={folder / 'v3_671b.json'}", "accept=[repeated_corpus]"]))


def test_corpus_is_read_at_most_100_times_by_its_real_tokens(tmp_path: Path) -> None:
    """The estimate before the run is generous; the prepared corpus decides, and the advice holds."""
    (tmp_path / "a.txt").write_text(" ".join(f"{number}" for number in range(6000)), "utf-8")
    given = ["experiment=quickstart", "data=files", f"data.paths=[{tmp_path}]", f"data.cache_dir={tmp_path / 'cache'}"]
    given += ["data.tokenizer_vocab_size=2048", "validation.sequences=0"]
    num_sequences = len(prepare_corpus(compose_run(given)).train.tokens_NL)
    sizes = compose_run(given).batch_sizes
    steps = sizes.steps_for(100 * num_sequences) + 1
    config = compose_run([*given, f"task.steps={steps}"])
    check(config)
    with pytest.raises(DataError, match=r"at most 100 times, .* 10\d times; nearest valid: task.steps=") as refused:
        prepare_corpus(config)
    (nearest,) = re.findall(r"nearest valid: task.steps=(\d+), or accept", str(refused.value))
    prepare_corpus(compose_run([*given, f"task.steps={nearest}"]))
    read = [sizes.sequences_before(int(nearest) + more) for more in (0, 1)]
    assert read[0] <= 100 * num_sequences < read[1]
    prepare_corpus(compose_run([*given, f"task.steps={steps}", "accept=[repeated_corpus]"]))


def test_tokenizer_of_the_initial_weights_may_be_small(tmp_path: Path) -> None:
    weights = weights_before(tmp_path, "quickstart_yarn")
    write_released(weights / "tokenizer.json", ["some text"], highest_id=700)
    given = ["experiment=quickstart", f"init_from={weights}", f"data.tokenizer={weights}"]
    config = compose_run(given)
    check_text(config, check_data(config))
    with pytest.raises(ConfigError, match=r"accept=.small_tokenizer.$"):
        check_text(replace(config, init_from=None), 701)


def test_recipe_mlperf_v3_has_the_rules_of_a_closed_entry(folder: Path) -> None:
    """The values equal those of mlcommons/logging at 7bbf792, training_6.0.0/closed_deepseekv3_671b.yaml."""
    config = build(folder, "mlperf_v3", "init_from=random")
    check(config)
    batch, optim, validation = config.batch, config.optim, config.validation
    assert batch.sequence_length_tokens == 4096
    assert batch.global_sequences >= 15_360
    assert optim.learning_rate == round(2.4e-5 * (batch.global_sequences / 16_384) ** 0.5, 9)
    adam = (optim.kind, optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_norm)
    assert adam == ("adamw", 0.9, 0.95, 1e-8, 0.1, 1.0)
    assert (validation.every_steps, validation.target_loss) == (1, 3.6)
    rates = [rates_of(config.task, optim, config.batch_sizes, step).learning_rate for step in (0, 3, 4, 11_996)]
    peak = optim.learning_rate
    assert rates == pytest.approx([peak / 4, peak, peak, 1e-8], rel=1e-4)
    with pytest.raises(CheckpointError, match=r"^init_from: .*mlperf_weights"):
        check(build(folder, "mlperf_v3"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length", "sequences"), [("v3_32k", 32_768, 1920), ("v3_128k", 131_072, 480)])
def test_recipe_v3_extension_is_the_published_phase_and_fits(
    folder: Path, name: str, length: int, sequences: int
) -> None:
    """The values equal those of arXiv:2412.19437, section 4.3; both phases have the same YaRN as the released model."""
    config = extension(folder, name)
    check_rules(config)
    check_memory(config, check_rules)
    batch, sizes = config.batch, config.batch_sizes
    assert (batch.sequence_length_tokens, batch.global_sequences, config.task.steps) == (length, sequences, 1000)
    rates = [rates_of(config.task, config.optim, sizes, step).learning_rate for step in (0, 500, 999)]
    assert rates == [7.3e-6] * 3
    assert config.model == compose_run(["model=v3_671b"]).model
    assert config.parallelism.world_size == 2048
    assert config.data.long_documents is not None
    assert config.num_micro_batches >= 2 * config.parallelism.pipeline


def test_recipe_quickstart_yarn_extends_a_quickstart_by_eight(folder: Path) -> None:
    before = compose_run(["experiment=quickstart"])
    config = compose_run(["experiment=quickstart_yarn", f"init_from={weights_before(folder, 'quickstart_yarn')}"])
    check_rules(config)
    rope = config.model.rope_scaling
    assert isinstance(rope, YarnRope)
    assert rope.original_max_position_tokens == before.batch.sequence_length_tokens
    assert config.batch.sequence_length_tokens == 8 * before.batch.sequence_length_tokens
    assert replace(config.model, rope_scaling=before.model.rope_scaling, max_position_tokens=4096) == before.model


@pytest.mark.slow
def test_recipe_v3_sft_is_the_published_fine_tuning(tmp_path: Path) -> None:
    """The values equal those of arXiv:2412.19437, section 5.1: two epochs, and a cosine from 5e-6 to 1e-6."""
    lines = [f'{{"prompt": "question {number}", "answer": "answer {number}"}}' for number in range(1500)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = ["init_from=null", f"data.paths=[{tmp_path}]", f"data.cache_dir={tmp_path / 'cache'}"]
    given += ["accept=[small_tokenizer,repeated_corpus]"]
    small = ["batch.sequence_length_tokens=32", "validation.sequences=0"]
    config = compose_run(["experiment=v3_sft", *given, *small])
    num_sequences = len(prepare_corpus(config).train.tokens_NL)
    assert config.task.steps == -(-2 * num_sequences // 1024)
    whole = compose_run(["experiment=v3_sft", *given, "task.steps=1000"])
    check(whole)
    sizes = whole.batch_sizes
    rates = [rates_of(whole.task, whole.optim, sizes, step).learning_rate for step in (10, 999)]
    assert rates == pytest.approx([5e-6, 1e-6], rel=1e-3)
    assert whole.batch.document_mask


def test_recipe_v3_grpo_fits_with_its_reference(tmp_path: Path) -> None:
    """The loss is that of arXiv:2512.02556; groups of 16 and the interval of the reference are those of R1."""
    lines = [f'{{"prompt": "What is {number} + 1?", "answer": "{number + 1}"}}' for number in range(100)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = [f"data.paths=[{tmp_path}]", "data.tokenizer=null", "accept=[small_tokenizer]", "init_from=random"]
    config = compose_run(["experiment=v3_grpo", *given])
    check(config)
    assert config.parallelism.world_size == 2048
    assert config.optim.learning_rate == 1e-6
    assert isinstance(config.task, GrpoConfig)
    assert config.task.has_reference
    loss = config.task.loss
    assert (loss.advantage, loss.kl, loss.normalizer) == ("centered", "reverse", "answers")
    assert config.task.loss.off_policy_limit is not None
    assert config.task.reference_every_steps == 400
    assert config.rollout is not None
    assert config.rollout.samples == 16


def test_recipe_quickstart_has_nearly_equal_ranks() -> None:
    config = compose_run(["experiment=quickstart"])
    placement = run_placement(config, config.schedule.kind)
    costs = stage_costs(nominal_times(config), config, run_cut(config, placement))
    ranks = [0.0] * config.parallelism.pipeline
    for row in placement:
        for rank, stage in zip(row, costs.stages, strict=True):
            ranks[rank] += stage.forward + stage.backward_input + stage.backward_weight
    assert max(ranks) <= 1.1 * sum(ranks) / len(ranks), ranks
    assert config.num_micro_batches >= 16

"""Policy gradients on many ranks equal one process, and configurations and sources that tasks refuse."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from base.refusal import ConfigError
from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from data.loader import Batch
from dualpipe.registry import ScheduleConfig
from kernels.attention.documents import Documents
from launch.config.run import check, compose_run
from model.config import PolicyLossConfig
from model.objective import LossSums
from model.transformer import Transformer, initialize_weights
from tests.answers import GRPO, VARIANTS, draw_answers, drawn, plain_answers, plain_loss
from tests.ranks import run_ranks
from tests.tiny import MODEL, tiny_config
from tests.train.job import close_job, configured_schedule, make_world
from train.config import TokenSchedule, TrainConfig
from train.core.learner import open_learner
from train.core.replica import StepBatch, open_replica
from train.core.step import accumulate
from train.core.world import ReplicaConfig
from train.predict.cut import run_cut
from train.tasks.grpo import GrpoConfig
from train.tasks.registry import TASKS, StepRates, open_task
from verify.steps import by_released_name, relative_error

LENGTH, LONGEST, ROWS = 40, 6, (3, 1, 0, 2, 4, 1, 2, 0)

LAYOUTS = [(2, 1, 1, "dualpipe"), (2, 1, 1, "zb_v"), (1, 2, 2, "1f1b"), (2, 1, 1, "dualpipe_split")]

RATES = StepRates(learning_rate=0.0, mtp_loss_weight=0.3, bias_update=0.0)


def run_config(folder: Path, form: PolicyLossConfig, layout: tuple[int, int, int, str] = LAYOUTS[0]) -> TrainConfig:
    pipeline, data, expert, kind = layout
    task = GrpoConfig(
        kind="grpo",
        steps=1,
        mtp_loss_weight=TokenSchedule.constant(0.3),
        balance_loss_weight=0.0,
        bias_update_rate=TokenSchedule.constant(0.0),
        loss=form,
        reference_every_steps=None,
        temperature=0.8,
        max_new_tokens=LONGEST,
        kl_limit=None,
    )
    config = tiny_config(
        folder,
        task=task,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
        model=replace(MODEL, num_layers=4),
    )
    sizes = {"global_sequences": len(ROWS), "sequence_length_tokens": LENGTH, "document_mask": True}
    return replace(config, batch=replace(config.batch, **sizes))  # type: ignore[arg-type]


def compared_config(
    folder: Path, form: PolicyLossConfig, layout: tuple[int, int, int, str] = LAYOUTS[0]
) -> TrainConfig:
    """Returns a run that measures the divergence from a reference, which the batches have, under every loss."""
    config = run_config(folder, form, layout)
    assert isinstance(config.task, GrpoConfig)
    return replace(config, task=replace(config.task, kl_limit=1.0))


def plain_model(config: TrainConfig) -> Transformer:
    model = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialize_weights(model, config.seed)
    return model


def draw_batch(model: Transformer) -> Batch:
    """Packed answers with log-probabilities of other models, near those of the model at the sampler's temperature."""
    batch = draw_answers(5, ROWS, LENGTH, MODEL.vocab_size)
    with torch.no_grad():
        own_BT = whole_log_probs(model, batch)
    names, scales = ("old_log_probs", "reference_log_probs", "sampler_log_probs"), (0.4, 0.5, 0.3)
    others = {
        name: (own_BT + scale * drawn(50 + place, *own_BT.shape)) * (batch.extras["weights"] != 0)
        for place, (name, scale) in enumerate(zip(names, scales, strict=True))
    }
    return replace(batch, extras={**batch.extras, **others})


def whole_log_probs(model: Transformer, batch: Batch) -> Tensor:
    documents = Documents.from_positions(batch.positions_BT)
    logs_BTV = (model(batch.tokens_BT, documents) / 0.8).log_softmax(-1)
    log_probs_BT1: Tensor = logs_BTV.gather(2, batch.targets(1).clamp_min(0)[..., None])
    return log_probs_BT1[..., 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Means of a step, the loss that it minimized, and gradients by released name."""

    means: dict[str, float]
    total: float
    gradients: dict[str, Tensor]


def run_policies(rank: int, world_size: int, configs: list[TrainConfig], batch: Batch) -> list[Found]:
    def read(first: int, count: int) -> Batch:
        place = slice(first, first + count)
        extras = {name: extra[place] for name, extra in batch.extras.items()}
        return replace(batch, tokens_BT=batch.tokens_BT[place], positions_BT=batch.positions_BT[place], extras=extras)

    found = []
    for config in configs:
        schedule = configured_schedule(config)
        cut = run_cut(config, schedule.placement)
        replica = open_replica(make_world(config, schedule), ReplicaConfig.of_run(config), schedule, cut)
        # The batch has the log-probabilities of a reference that is not the policy itself.
        learner = open_learner(replica, config.optim, config.ema)
        losses = accumulate(learner, config.task, StepBatch((read,)), RATES).losses
        gradients = by_released_name(learner.replica.model, learner.store.gradient)
        found.append(Found(means=dict(losses.by_name), total=losses.total, gradients=gradients))
        dist.barrier()
        close_job(learner)
    return found


def run_whole(config: TrainConfig, batch: Batch, mtp_loss_weight: float) -> Found:
    """The objective of the whole batch in this process."""
    model, task = plain_model(config), open_task(config.task, config.model, config.batch)
    read, sums = task.read(batch, torch.device("cpu")), LossSums(task.names)
    counts, rates = task.count(read), replace(RATES, mtp_loss_weight=mtp_loss_weight)
    model.loss(read, task.objective(counts, rates), sums).backward()
    means = dict(zip(task.names, (sums.settle() / counts).tolist(), strict=True))
    gradients = by_released_name(model, gradient_of)
    return Found(means=means, total=task.total(means, rates), gradients=gradients)


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        assert relative_error(ours[name], gradient) <= 1e-10, f"gradient of {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_one_process_equals_autograd_on_whole_logits(tmp_path: Path, name: str) -> None:
    form = VARIANTS[name]
    config = compared_config(tmp_path, form)
    model = plain_model(config)
    batch = draw_batch(model)
    found = run_whole(config, batch, 0.0)
    loss = plain_loss(form, list(plain_answers(whole_log_probs(model, batch), dict(batch.extras))), LONGEST)
    loss.backward()
    assert found.means["main"] == pytest.approx(float(loss.detach()), rel=1e-11)
    assert found.total == found.means["main"]
    assert_near(found.gradients, by_released_name(model, gradient_of))


@pytest.mark.slow
def test_ranks_equal_one_process_under_several_schedules(tmp_path: Path) -> None:
    """One and two sweeps of the head, all normalizers; some ranks have no answer."""
    names = ("dr_grpo", "v3", "dapo", "v3_2")
    configs = [compared_config(tmp_path, VARIANTS[name], layout) for name, layout in zip(names, LAYOUTS, strict=True)]
    batch = draw_batch(plain_model(configs[0]))
    results = run_ranks(2, run_policies, configs, batch)
    for place, config in enumerate(configs):
        expected = run_whole(config, batch, RATES.mtp_loss_weight)
        ranks = [rank[place] for rank in results]
        for rank in ranks:
            assert rank.means == pytest.approx(expected.means, rel=1e-10, abs=1e-14)
            assert rank.total == pytest.approx(expected.total, rel=1e-10)
        gradients = {
            name: torch.stack([rank.gradients[name] for rank in ranks if name in rank.gradients]).sum(0)
            for name in set().union(*(rank.gradients for rank in ranks))
        }
        assert_near(gradients, expected.gradients)


WEIGHTED = VARIANTS["cispo"]


@pytest.mark.parametrize(
    ("form", "rule"),
    [
        (replace(GRPO, kl_weight=0.1), "task.loss.kl_weight: must be 0 with task.loss.kl=none, is 0.1"),
        (replace(WEIGHTED, clip_low=0.2), "task.loss.clip_low: must be null with task.loss.surrogate=weighted"),
        (replace(WEIGHTED, clip_high=0.2), "task.loss.clip_high: must be null with task.loss.surrogate=weighted"),
        (replace(GRPO, largest_ratio=1.1), "task.loss.largest_ratio: must be 1.2 or above"),
        (replace(WEIGHTED, largest_ratio=0.5), "task.loss.largest_ratio: must be 1 or above"),
    ],
)
def test_loss_with_a_value_without_effect_is_refused(tmp_path: Path, form: PolicyLossConfig, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        TASKS.get("grpo").check(run_config(tmp_path, form))


def test_every_variant_is_valid_and_says_whether_it_has_a_reference(tmp_path: Path) -> None:
    has_reference = []
    for name, form in VARIANTS.items():
        config = run_config(tmp_path, form)
        TASKS.get("grpo").check(config)
        assert isinstance(config.task, GrpoConfig)
        assert config.task.advantage == form.advantage
        if TASKS.get("grpo").has_reference(config.task):
            has_reference.append(name)
    assert has_reference == ["dapo_kl", "grpo", "r1", "v3", "v3_2"]


@pytest.mark.parametrize("task", ["dpo", "reward_model"])
def test_task_on_pairs_rejects_demonstrations(task: str) -> None:
    given = ["experiment=arithmetic_sft", f"task={task}", "init_from=random", "data.form=preferences"]
    check(compose_run([*given, "model.mtp_depth=0"]))
    with pytest.raises(
        ConfigError,
        match=rf"^data\.kind: must be a source whose samples have the value (pair|score) for task\.kind={task}, is ",
    ):
        check(compose_run([*given[:3], "data.form=demonstrations"]))

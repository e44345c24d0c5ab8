"""Small configurations for tests, with every feature on."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from comm.config import AllToAllDispatchConfig, ClusterConfig, ParallelismConfig
from data.config import DataConfig
from data.readers.sources import FilesSource
from dualpipe.costs import Costs
from dualpipe.registry import ScheduleConfig
from model.config import ATTENTION_FORMS, RECOMPUTED, GqaConfig, MlaConfig, ModelConfig, PlainRope
from train.config import (
    BatchConfig,
    CheckpointingConfig,
    EmaConfig,
    PrecisionConfig,
    ProfileConfig,
    SamplesConfig,
    StopGuardConfig,
    TokenSchedule,
    TrackConfig,
    TrainConfig,
    ValidationConfig,
)
from train.optim.learning_rate import DecayedRate, Duration, OptimConfig
from train.optim.muon import MuonConfig
from train.optim.registry import OPTIMIZERS, AdamWConfig
from train.tasks.pretrain import PretrainConfig

MODEL = MlaConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=4,
    num_dense_layers=1,
    dense_intermediate_size=48,
    num_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    num_routed_experts=8,
    num_shared_experts=1,
    num_experts_per_token=4,
    expert_intermediate_size=16,
    num_expert_groups=4,
    num_limited_groups=2,
    routed_scaling_factor=2.5,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=PlainRope(kind="plain"),
    max_position_tokens=64,
    mtp_depth=1,
    mtp_hidden="post_norm",
    initializer_range=0.1,
    head="tokens",
)


def small_model(form: str) -> ModelConfig:
    """Returns `MODEL` with another form of attention, which has the keys of its small models."""
    spec = ATTENTION_FORMS.get(form)
    shared = {field.name: getattr(MODEL, field.name) for field in fields(ModelConfig)}
    return spec.config(**{**shared, **spec.small, "attention": form})


GQA = cast("GqaConfig", small_model("gqa"))

OPTIM = AdamWConfig(
    kind="adamw",
    learning_rate=1e-2,
    schedule=DecayedRate(
        kind="cosine",
        warmup=Duration(amount=1, unit="steps"),
        decay_start=Duration(amount=100, unit="steps"),
        decay_end=Duration(amount=200, unit="steps"),
        final_ratio=0.1,
    ),
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    sharding="replicated",
    moments="float32",
    bucket_elements=50_000_000,
)


def small_optimizer(kind: str) -> OptimConfig:
    """Returns `OPTIM` with another kind, which has the keys of its example."""
    spec = OPTIMIZERS.get(kind)
    shared = {field.name: getattr(OPTIM, field.name) for field in fields(OptimConfig)}
    return spec.config(**{**shared, **spec.example, "kind": kind})


MUON = cast("MuonConfig", small_optimizer("muon"))

TASK = PretrainConfig(
    kind="pretrain",
    steps=2,
    mtp_loss_weight=TokenSchedule.constant(0.3),
    balance_loss_weight=0.01,
    bias_update_rate=TokenSchedule.constant(0.05),
)

BATCH = BatchConfig(sequence_length_tokens=24, global_sequences=16, ramp=None, micro_sequences=1, document_mask=False)
VALIDATION = ValidationConfig(every_steps=0, sequences=0)
CHECKPOINTING = CheckpointingConfig(every_steps=0, keep=None)
SAMPLES = SamplesConfig(prompt="", held_out=0, tokens=0, temperature=0.0)


def data_config(folder: Path, **changes: Any) -> DataConfig:
    config = DataConfig(
        source=FilesSource(kind="files", paths=(str(folder / "text"),), text_field="text"),
        tokenizer=None,
        tokenizer_bos=None,
        tokenizer_eos=None,
        tokenizer_pad=None,
        tokenizer_vocab_size=300,
        validation_fraction=0.2,
        fim_rate=0.0,
        seed=0,
        cache_dir=str(folder / "cache"),
    )
    return replace(config, **changes)


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """Returns the configuration of a float64 run in `folder` on the CPU, with one rank by default."""
    config = TrainConfig(
        name="tiny",
        out_dir=str(folder / "run"),
        rescue_dir="",
        seed=7,
        resume=None,
        init_from=None,
        init_mtp="checkpoint",
        cluster=ClusterConfig(
            device="cpu",
            backend="gloo",
            ranks_per_node=2,
            threads_per_rank=1,
            timeout_seconds=60.0,
            peak_flops=None,
            memory_bytes=None,
            memory_reserve_bytes=0,
            grace_seconds=60.0,
            max_restarts=0,
        ),
        parallelism=ParallelismConfig(pipeline=1, data=1, expert=1),
        dispatch=AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=4, node_cap="verify"),
        model=MODEL,
        data=data_config(folder, tokenizer_vocab_size=320, fim_rate=0.5, seed=3),
        task=TASK,
        batch=BATCH,
        validation=VALIDATION,
        checkpointing=CHECKPOINTING,
        samples=SAMPLES,
        rollout=None,
        reward=None,
        optim=OPTIM,
        ema=EmaConfig(decay=None),
        precision=PrecisionConfig(kind="float64"),
        schedule=ScheduleConfig(kind="1f1b", chunks=None, pairing="overlapped"),
        costs=Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0),
        memory_cap=None,
        recompute=RECOMPUTED,
        attention="auto",
        guard=StopGuardConfig(kind="stop", spike_factor=0.0, spike_window_steps=16),
        track=TrackConfig(
            wandb="disabled", project="tests", log_every_steps=1, picture_every_steps=0, loads_every_steps=1
        ),
        profile=ProfileConfig(steps=(), ranks=(0,), trace=True, memory_snapshot=False),
        plugins=(),
    )
    return replace(config, **changes)


def write_text(folder: Path, num_files: int = 60) -> None:
    """Writes text files of many lengths under `folder/text`, following a fixed rule."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        words = [
            f"{'abcdefgh'[(number * 7 + word * word) % 8]}{(number + 3 * word) % 13}" for word in range(number % 17 + 4)
        ]
        (folder / "text" / f"file_{number:03}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")

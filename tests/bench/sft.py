"""Measures CPU seconds of a step of supervised fine-tuning, here and in TRL's SFTTrainer on the same small model.

A step is everything between two updates: the batch, forward, loss of the answers, backward, clipping and AdamW.
"""

import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.prepare import Prepared
from tests.bench.turns import Steps, StepSample, measure_in_turns, trl_text

MOST_OF_TRL = 0.85
SAMPLES, SAMPLE_TOKENS, PROMPT_TOKENS = 64, 21, 12
_PACKED = 4
_LEARNING_RATE = 3e-3


def measure_sft(num_rounds: int) -> dict[str, StepSample]:
    """Runs steps of both contenders in turn, after unmeasured ones."""
    return measure_in_turns(num_rounds, {"here": _serve_here, "TRL": _serve_trl})


def sft_text(samples: dict[str, StepSample]) -> str:
    """Formats the table."""
    subject = f"supervised fine-tuning: {SAMPLES} samples of {SAMPLE_TOKENS} tokens, 0.75M weights"
    return trl_text(subject, samples, MOST_OF_TRL)


def _prepared() -> Prepared:
    """Returns the samples of the recipe."""
    from launch.config.run_config import compose_run
    from train.corpus import prepare_corpus

    return prepare_corpus(compose_run(["experiment=arithmetic_sft"]))


def _rows(prepared: Prepared, num_steps: int) -> dict[str, list[list[int]]]:
    """Returns the samples of all steps, one in a row, with the answers' tokens as labels."""
    needed = SAMPLES * num_steps
    tokens, positions = prepared.train_tokens_NL.reshape(-1), prepared.train_positions_NL.reshape(-1)
    starts = np.flatnonzero(positions == 0)[:needed]
    ids = [tokens[start : start + SAMPLE_TOKENS].tolist() for start in starts]
    return {"input_ids": ids, "labels": [[-100] * PROMPT_TOKENS + each[PROMPT_TOKENS:] for each in ids]}


def transformers_model() -> torch.nn.Module:
    """Returns the recipe's architecture in transformers, in its fastest mode on a CPU."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from launch.config.run_config import compose_run
    from model.hf.config import write_config

    keys = write_config(compose_run(["experiment=arithmetic_sft"]).model, dtype="F32", fp8=False)
    config = DeepseekV3Config(**keys, attn_implementation="sdpa")
    config._experts_implementation = "eager"
    model: torch.nn.Module = DeepseekV3ForCausalLM(config)
    return model


def _serve_here(num_steps: int, pipe: Connection) -> None:
    """Trains with the project's own step on one rank."""
    torch.set_num_threads(1)
    from torch import distributed as dist

    from launch.config.run_config import compose_run
    from launch.ranks.environment import apply_rank_environment
    from tests.train.job import close_job, open_job, open_loader
    from train.step import train_step

    # Settings for one rank on a CPU, and the environment that the launcher sets for it.
    config = compose_run(
        [
            *("experiment=arithmetic_sft", "parallelism=one_rank", "schedule=1f1b", f"task.steps={num_steps}"),
            f"batch.sequence_length_tokens={SAMPLE_TOKENS * _PACKED}",
            *(f"batch.{key}_sequences={SAMPLES // _PACKED}" for key in ("global", "micro")),
            *("validation.sequences=0", "optim/schedule=constant", f"optim.learning_rate={_LEARNING_RATE}"),
            *("task.bias_update_rate=0", "task.balance_loss_weight=0", "recompute=[]", "optim.sharding=replicated"),
        ]
    )
    apply_rank_environment(config.cluster)
    steps = Steps(pipe)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    learner, loader = open_job(config), open_loader(config)
    for step in range(num_steps):
        steps.start()
        steps.end(train_step(learner, config.task, loader, step).losses.main)
    close_job(learner)
    dist.destroy_process_group()


def _serve_trl(num_steps: int, pipe: Connection) -> None:
    """Trains with TRL's trainer on the same samples, one in a row; all rows have the same length."""
    torch.set_num_threads(1)
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    steps = Steps(pipe)

    class Serve(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *rest: Any, **values: Any) -> None:
            steps.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
            steps.end(float("nan"))
            if state.global_step < num_steps:
                steps.start()

    prepared = _prepared()
    with tempfile.TemporaryDirectory() as folder:
        prepared.tokenizer.save(Path(folder) / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            eos_token="<｜end▁of▁sentence｜>",
            pad_token="<｜▁pad▁｜>",
        )
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=SAMPLES,
            max_steps=num_steps,
            learning_rate=_LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=transformers_model(),
            args=arguments,
            train_dataset=Dataset.from_dict(_rows(prepared, num_steps)),
            processing_class=tokenizer,
            callbacks=[Serve()],
        )
        trainer.train()

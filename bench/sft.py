"""Measures CPU seconds of a step of supervised fine-tuning, here and in TRL's SFTTrainer on the same small model.

A step is everything between two updates: the batch, forward, loss of the answers, backward, clipping and AdamW.
"""

import tempfile
from multiprocessing.connection import Connection

import numpy as np
import torch

from bench.turns import (
    StepSample,
    measure_in_turns,
    serve_here,
    serve_trl,
    trl_settings,
    trl_text,
    trl_tokenizer,
)
from data.shards.open import Prepared

MOST_OF_TRL = 0.85
SAMPLES, SAMPLE_TOKENS, PROMPT_TOKENS = 64, 21, 12
_PACKED = 4
_LEARNING_RATE = 3e-3


def measure_sft(num_rounds: int) -> dict[str, StepSample]:
    """Runs steps of both contenders in turn, after unmeasured ones."""
    return measure_in_turns(num_rounds, {"here": _serve_here, "TRL": _serve_trl})


def sft_text(samples: dict[str, StepSample]) -> str:
    subject = f"supervised fine-tuning: {SAMPLES} samples of {SAMPLE_TOKENS} tokens, 0.75M weights"
    return trl_text(subject, samples, MOST_OF_TRL)


def _prepared() -> Prepared:
    from launch.config.run import compose_run
    from train.start.corpus import prepare_corpus

    return prepare_corpus(compose_run(["experiment=arithmetic_sft"]))


def _rows(prepared: Prepared, num_steps: int) -> dict[str, list[list[int]]]:
    """Returns the samples of all steps, one in a row, with the answers' tokens as labels."""
    needed = SAMPLES * num_steps
    tokens, positions = prepared.train.tokens_NL[:].reshape(-1), prepared.train.positions_NL[:].reshape(-1)
    starts = np.flatnonzero(positions == 0)[:needed]
    ids = [tokens[start : start + SAMPLE_TOKENS].tolist() for start in starts]
    return {"input_ids": ids, "labels": [[-100] * PROMPT_TOKENS + each[PROMPT_TOKENS:] for each in ids]}


def transformers_model() -> torch.nn.Module:
    """Returns the recipe's architecture in transformers, in its fastest mode on a CPU."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from launch.config.run import compose_run
    from model.hf.config import write_config

    keys = write_config(compose_run(["experiment=arithmetic_sft"]).model, dtype="F32", fp8=False)
    config = DeepseekV3Config(**keys, attn_implementation="sdpa")
    config._experts_implementation = "eager"
    model: torch.nn.Module = DeepseekV3ForCausalLM(config)
    return model


def _serve_here(num_steps: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    from launch.config.run import compose_run

    config = compose_run(
        [
            *("experiment=arithmetic_sft", "parallelism=one_rank", "schedule=1f1b", f"task.steps={num_steps}"),
            f"batch.sequence_length_tokens={SAMPLE_TOKENS * _PACKED}",
            *(f"batch.{key}_sequences={SAMPLES // _PACKED}" for key in ("global", "micro")),
            *("validation.sequences=0", "optim/schedule=constant", f"optim.learning_rate={_LEARNING_RATE}"),
            *("task.bias_update_rate=0", "task.balance_loss_weight=0", "recompute=[]", "optim.sharding=replicated"),
        ]
    )
    serve_here(config, pipe)


def _serve_trl(num_steps: int, pipe: Connection) -> None:
    """Trains on the same samples, one in a row; all rows have the same length."""
    torch.set_num_threads(1)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    prepared = _prepared()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = trl_tokenizer(prepared.tokenizer, folder)
        arguments = SFTConfig(
            **trl_settings(folder, num_steps),
            per_device_train_batch_size=SAMPLES,
            learning_rate=_LEARNING_RATE,
            weight_decay=0.1,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        serve_trl(
            SFTTrainer,
            num_steps,
            pipe,
            model=transformers_model(),
            args=arguments,
            train_dataset=Dataset.from_dict(_rows(prepared, num_steps)),
            processing_class=tokenizer,
        )

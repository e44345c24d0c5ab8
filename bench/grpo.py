"""Measures CPU seconds of a step of GRPO, here and in TRL's GRPOTrainer without vLLM on the same small model.

A step samples 64 answers of 10 tokens to 8 prompts, scores them, and updates the weights once, with a reference.
"""

import tempfile
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.sft import transformers_model
from bench.turns import (
    StepSample,
    measure_in_turns,
    serve_here,
    serve_trl,
    trl_settings,
    trl_text,
    trl_tokenizer,
)

MOST_OF_TRL = 0.85
PROMPTS, SAMPLES, NEW_TOKENS = 8, 8, 10
_PACKED, _PROMPT_TOKENS = 4, 12
_LEARNING_RATE, _KL_WEIGHT = 1e-4, 0.001


def measure_grpo(num_rounds: int) -> dict[str, StepSample]:
    """Runs steps of both contenders in turn, after unmeasured ones."""
    return measure_in_turns(num_rounds, {"here": _serve_here, "TRL": _serve_trl})


def grpo_text(samples: dict[str, StepSample]) -> str:
    subject = f"GRPO: {PROMPTS} x {SAMPLES} answers of {NEW_TOKENS} tokens, 0.75M weights, with a reference"
    return trl_text(subject, samples, MOST_OF_TRL)


def _serve_here(num_steps: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    from dataclasses import replace

    from launch.config.run import compose_run
    from tests.rollouts import REWARD

    with tempfile.TemporaryDirectory() as folder:
        config = compose_run(
            [
                *("experiment=arithmetic_grpo", "parallelism=one_rank", "schedule=1f1b", f"task.steps={num_steps}"),
                *(f"rollout.prompts={PROMPTS}", f"rollout.samples={SAMPLES}", f"rollout.max_new_tokens={NEW_TOKENS}"),
                *("rollout.drop_equal_groups=false", "task.loss.kl=forward", f"task.loss.kl_weight={_KL_WEIGHT}"),
                f"batch.sequence_length_tokens={(_PROMPT_TOKENS + NEW_TOKENS) * _PACKED}",
                *(f"batch.{key}_sequences={PROMPTS * SAMPLES // _PACKED}" for key in ("global", "micro")),
                *("validation.sequences=0", f"optim.learning_rate={_LEARNING_RATE}", "rollout.limits.kl=null"),
                *("rollout.held_out=0", "recompute=[]", "optim.sharding=replicated", f"out_dir={folder}"),
            ]
        )
        serve_here(replace(config, reward=REWARD), pipe)


def _reward(completions: list[str], **values: Any) -> list[float]:
    return [float(sum(each in "02468" for each in text)) for text in completions]


def _serve_trl(num_steps: int, pipe: Connection) -> None:
    """Trains on prompts of the same length."""
    torch.set_num_threads(1)
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from data.arithmetic import arithmetic_tokenizer, problems

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = trl_tokenizer(arithmetic_tokenizer(), folder)
        model = transformers_model()
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        model.config._name_or_path = folder  # type: ignore[union-attr]  # the trainer loads the reference from it
        texts = [f"<｜begin▁of▁sentence｜><｜User｜>{each.prompt}" for each in problems(0, PROMPTS * num_steps)]
        arguments = GRPOConfig(
            **trl_settings(folder, num_steps),
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            beta=_KL_WEIGHT,
            learning_rate=_LEARNING_RATE,
            weight_decay=0.0,
            temperature=1.0,
        )
        serve_trl(
            GRPOTrainer,
            num_steps,
            pipe,
            model=model,
            reward_funcs=_reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
        )

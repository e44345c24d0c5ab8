"""Measures CPU seconds of a step of GRPO, here and in TRL's GRPOTrainer without vLLM on the same small model.

A step samples 64 answers of 10 tokens to 8 prompts, scores them, and updates the weights once, with a reference.
"""

import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.bench.sft import transformers_model
from tests.bench.turns import Steps, StepSample, measure_in_turns, trl_text

MOST_OF_TRL = 0.75
PROMPTS, SAMPLES, NEW_TOKENS = 8, 8, 10
_PACKED, _PROMPT_TOKENS = 4, 12
_LEARNING_RATE, _KL_WEIGHT = 1e-4, 0.001


def measure_grpo(num_rounds: int) -> dict[str, StepSample]:
    """Runs steps of both contenders in turn, after unmeasured ones."""
    return measure_in_turns(num_rounds, {"here": _serve_here, "TRL": _serve_trl})


def grpo_text(samples: dict[str, StepSample]) -> str:
    """Formats the table."""
    subject = f"GRPO: {PROMPTS} x {SAMPLES} answers of {NEW_TOKENS} tokens, 0.75M weights, with a reference"
    return trl_text(subject, samples, MOST_OF_TRL)


def _serve_here(num_steps: int, pipe: Connection) -> None:
    """Trains with the project's own step on one rank."""
    torch.set_num_threads(1)
    from dataclasses import replace

    from torch import distributed as dist

    from launch.config.run_config import compose_run
    from launch.ranks.environment import apply_rank_environment
    from tests.rollouts import REWARD
    from tests.train.job import close_job, open_job, open_loader
    from train.step import train_step

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
        config = replace(config, reward=REWARD)
        apply_rank_environment(config.cluster)
        steps = Steps(pipe)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        learner, loader = open_job(config), open_loader(config)
        for step in range(num_steps):
            steps.start()
            steps.end(train_step(learner, config.task, loader, step).losses.main)
        close_job(learner)
        dist.destroy_process_group()


def _reward(completions: list[str], **values: Any) -> list[float]:
    return [float(sum(each in "02468" for each in text)) for text in completions]


def _serve_trl(num_steps: int, pipe: Connection) -> None:
    """Trains with TRL's trainer on prompts of the same length."""
    torch.set_num_threads(1)
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from data.arithmetic import arithmetic_tokenizer, problems

    steps = Steps(pipe)

    class Serve(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *rest: Any, **values: Any) -> None:
            steps.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
            steps.end(float("nan"))
            if state.global_step < num_steps:
                steps.start()

    with tempfile.TemporaryDirectory() as folder:
        arithmetic_tokenizer().save(Path(folder) / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            eos_token="<｜end▁of▁sentence｜>",
            pad_token="<｜▁pad▁｜>",
        )
        model = transformers_model()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.config._name_or_path = folder  # from which the trainer loads the reference
        texts = [f"<｜begin▁of▁sentence｜><｜User｜>{each.prompt}" for each in problems(0, PROMPTS * num_steps)]
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            max_steps=num_steps,
            beta=_KL_WEIGHT,
            learning_rate=_LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=_reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Serve()],
        )
        trainer.train()

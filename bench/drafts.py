"""Measures CPU seconds of generation with drafts, without, and with `speculative=auto`: one thread, in turns.

The model is that of `training.py` with an MTP module. Its weights are such that drafts are mostly right or never.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from bench.training import SHAPES, architecture
from comm.dispatch.local import LocalDispatcher
from infer.config import Speculative
from model.transformer import Transformer, initialize_weights
from tests.infer.continuing import generate

PROMPT_TOKENS, NEW_TOKENS = 64, 128
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CHOICES: tuple[Speculative, ...] = (True, False, "auto")


@dataclass(frozen=True, slots=True)
class DraftSample:
    """CPU seconds of each choice at a batch size, by `CHOICES`, and the share of drafts that were right."""

    drafts: str
    batch_size: int
    acceptance: float
    seconds: tuple[tuple[float, ...], ...]


def measure_drafts(num_rounds: int) -> list[DraftSample]:
    """Generates with all choices in turn, after one unmeasured round; raises ValueError if tokens differ."""
    torch.set_num_threads(1)
    samples = []
    for drafts in ("right", "useless"):
        model = draft_model(are_right=drafts == "right")
        for batch_size in BATCH_SIZES:
            generator = torch.Generator().manual_seed(batch_size)
            prompts = torch.randint(model.config.vocab_size, (batch_size, PROMPT_TOKENS), generator=generator).tolist()
            seconds: list[list[float]] = [[] for _ in CHOICES]
            for number in range(1 + num_rounds):
                made = []
                for choice, times in zip(CHOICES, seconds, strict=True):
                    began = time.process_time()
                    made.append(
                        generate(model, prompts, max_new_tokens=NEW_TOKENS, speculative=choice, batch_size=batch_size)
                    )
                    times += [time.process_time() - began] if number else []
                if any(each.continuations != made[0].continuations for each in made):
                    raise ValueError(f"drafts: all choices must generate equal tokens, differ at batch {batch_size}")
            acceptance = made[0].statistics.acceptance_rate
            samples.append(DraftSample(drafts, batch_size, acceptance, tuple(map(tuple, seconds))))
    return samples


def drafts_text(samples: list[DraftSample]) -> str:
    """Formats a table of `auto` next to the better of drafts and none."""
    lines = [
        f"Drafts: prompt {PROMPT_TOKENS}, {NEW_TOKENS} new tokens, float32, one thread, equal tokens, CPU s in turns",
        f"{'':10}{'right':>7}{'batch':>7}{'on':>8}{'off':>8}{'auto':>8}{'better/auto':>12}{'least':>7}{'goal':>6}",
    ]
    for sample in samples:
        on, off, auto = (statistics.median(times) for times in sample.seconds)
        least_on, least_off, least = (min(times) for times in sample.seconds)
        lines.append(
            f"{sample.drafts:10}{sample.acceptance * 100:5.0f} %{sample.batch_size:7}{on:8.3f}{off:8.3f}{auto:8.3f}"
            f"{min(on, off) / auto:12.3f}{min(least_on, least_off) / least:7.3f}{0.97:6.2f}"
        )
    return "\n".join(lines)


def draft_model(*, are_right: bool) -> Transformer:
    """Builds a model whose MTP module mostly drafts the token that the main model chooses, or never."""
    config = replace(architecture(SHAPES["11.5M"]), mtp_depth=1)
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    initialize_weights(model, 0)
    if are_right:
        # Embeddings dominate the output of layers, so both choices mostly follow from the last token.
        with torch.no_grad():
            assert model.model.embed_tokens is not None
            model.model.embed_tokens.weight.mul_(40.0)
            one = torch.eye(config.hidden_size)
            model.mtp_block(1).eh_proj.weight.copy_(torch.cat((one, 0 * one), 1))
    return model

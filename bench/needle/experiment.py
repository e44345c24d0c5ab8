"""Trains and extends the needle test's network with the project's own model, measures it, and checks the results."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.needle.rows import VOCAB_SIZE, Rows, is_key
from comm.dispatch.local import LocalDispatcher
from kernels.cross_entropy.reference import IGNORE
from model.config import MlaConfig, PlainRope, YarnRope
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.transformer import Transformer, initialize_weights

BASE_LENGTH, FACTOR = 128, 8
LONG_LENGTH = BASE_LENGTH * FACTOR
TOKENS_PER_STEP = 2048
_BASE_RATE, _LONG_RATE = 6e-3, 2e-4

PLAIN = MlaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    num_layers=2,
    num_dense_layers=1,
    dense_intermediate_size=256,
    num_heads=4,
    q_lora_rank=None,
    kv_lora_rank=48,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    num_routed_experts=8,
    num_shared_experts=1,
    num_experts_per_token=2,
    expert_intermediate_size=64,
    num_expert_groups=1,
    num_limited_groups=1,
    routed_scaling_factor=1.0,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=PlainRope(kind="plain"),
    max_position_tokens=BASE_LENGTH,
    mtp_depth=0,
    mtp_hidden="post_norm",
    initializer_range=0.1,
    head="tokens",
)
"""The base model; no rule limits how many positions a pass reads."""

YARN = replace(
    PLAIN,
    max_position_tokens=LONG_LENGTH,
    rope_scaling=YarnRope(
        kind="yarn",
        factor=FACTOR,
        original_max_position_tokens=BASE_LENGTH,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)


def build(config: MlaConfig, seed: int) -> Transformer:
    """Builds the network with the weights of a seed, in float32."""
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    initialize_weights(model, seed)
    return model


def with_rope(base: Transformer, config: MlaConfig) -> Transformer:
    """Returns a copy of a network with another rotary embedding."""
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    model.load_state_dict(base.state_dict())
    return model


def train(model: Transformer, steps: int, *, is_base: bool, seed: int) -> None:
    """Trains the network in place for steps of 2,048 tokens.

    Args:
        is_base: base training at length 128 from random weights; otherwise the extension at length 1,024.
    """
    length, rate = (BASE_LENGTH, _BASE_RATE) if is_base else (LONG_LENGTH, _LONG_RATE)
    rows = Rows(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _rate_share(step, steps, is_base=is_base)
        tokens_BT = rows.batch(TOKENS_PER_STEP // length, length)
        optimizer.zero_grad()
        loss_of(model, tokens_BT).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def loss_of(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Returns the mean cross-entropy of rows, with the balance loss. Keys are no targets, because they are random."""
    targets_BT = tokens_BT[:, 1:].masked_fill(is_key(tokens_BT[:, 1:]), IGNORE)
    batch = MicroBatch(inputs_BT=(tokens_BT[:, :-1],), targets_BT=(targets_BT,))
    num_targets = int((targets_BT != IGNORE).sum())
    objective = CrossEntropy(factors=(1 / num_targets,), balance=1e-3 / len(tokens_BT))
    return model.loss(batch, objective, LossSums(loss_names(0)))


def _rate_share(step: int, steps: int, *, is_base: bool) -> float:
    """Returns the share of the peak learning rate: a warm-up, then a decay; of the base over its last fifth."""
    if is_base:
        return min((step + 1) / 20, 1.0, max((steps - step) / (0.2 * steps), 0.05))
    return min((step + 1) / 5, (steps - step) / steps)


LENGTHS = (128, 256, 512, 1024)
DEPTHS = tuple(number / 8 for number in range(9))
_NEEDLE_SEED, _TEXT_SEED = 90_001, 90_002
_TEXT_ROWS = 24
_ROWS_PER_PASS = 4096


@dataclass(frozen=True, slots=True)
class Measured:
    """What a network does at every length.

    Attributes:
        accuracy: share of right answers by length and depth.
        first_bits: bits per byte of unseen text at positions up to the base length.
        last_bits: bits per byte in the last half of the long length.
    """

    accuracy: tuple[tuple[float, ...], ...]
    first_bits: float
    last_bits: float

    def mean(self, length: int) -> float:
        """Returns the mean accuracy over depths at a length."""
        row = self.accuracy[LENGTHS.index(length)]
        return sum(row) / len(row)


@torch.no_grad()
def measure(model: Transformer, samples: int = 36, lengths: tuple[int, ...] = LENGTHS) -> Measured:
    """Measures a network on rows that are the same for every network.

    Args:
        lengths: lengths that are asked at; at others the accuracy is 0.
    """
    rows = Rows(_NEEDLE_SEED)
    accuracy = [
        tuple(_share_right(model, rows, length, depth, samples) if length in lengths else 0.0 for depth in DEPTHS)
        for length in LENGTHS
    ]
    nats_T = _text_nats(model, Rows(_TEXT_SEED).text(_TEXT_ROWS, LONG_LENGTH))
    first, last = nats_T[: BASE_LENGTH - 1], nats_T[LONG_LENGTH // 2 - 1 :]
    return Measured(tuple(accuracy), *(float(part.mean()) / math.log(2) for part in (first, last)))


def _share_right(model: Transformer, rows: Rows, length: int, depth: float, samples: int) -> float:
    """Returns the share of greedy answers, over the whole vocabulary, that are the needle's value."""
    asked = [rows.needle(length, depth) for _ in range(samples)]
    tokens_BT, values_B = torch.from_numpy(np.stack([row for row, _ in asked])), [value for _, value in asked]
    per_pass = max(_ROWS_PER_PASS // length, 1)
    answers = [model(part_BT)[:, -1].argmax(-1) for part_BT in tokens_BT.split(per_pass)]
    return float((torch.cat(answers) == torch.tensor(values_B)).double().mean())


def _text_nats(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Returns the mean cross-entropy of each predicted position over rows, [T - 1]."""
    nats = [
        functional.cross_entropy(model(part_BT[:, :-1]).transpose(1, 2), part_BT[:, 1:], reduction="none")
        for part_BT in tokens_BT.split(4)
    ]
    return torch.cat(nats).double().mean(0)


VARIANTS = ("plain", "yarn", "yarn_trained", "plain_trained")
NAMES = {
    "plain": "plain extrapolation",
    "yarn": "YaRN, no training",
    "yarn_trained": "YaRN, {steps} steps",
    "plain_trained": "plain, {steps} steps",
}
Results = dict[str, Measured]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps of the base and of the extension, and what is asked."""

    base_steps: int = 1200
    long_steps: int = 40
    samples: int = 36
    lengths: tuple[int, ...] = LENGTHS


def run_seed(seed: int, recipe: Recipe) -> Results:
    """Trains a base, extends it with and without YaRN, and measures all four networks. Uses one thread."""
    torch.set_num_threads(1)
    base = build(PLAIN, seed)
    train(base, recipe.base_steps, is_base=True, seed=1_000 + seed)
    stretched = with_rope(base, YARN)
    found = {"plain": measure(base, recipe.samples, recipe.lengths)}
    found["yarn"] = measure(stretched, recipe.samples, recipe.lengths)
    for name, model in (("yarn_trained", stretched), ("plain_trained", base)):
        train(model, recipe.long_steps, is_base=False, seed=2_000 + seed)
        found[name] = measure(model, recipe.samples, recipe.lengths)
    return found


def failures(found: Results) -> list[str]:
    """Returns what a seed's results should be and are not."""
    far = {name: found[name].mean(LONG_LENGTH) for name in VARIANTS}
    near = {name: found[name].mean(BASE_LENGTH) for name in VARIANTS}
    bits = {name: found[name].last_bits for name in VARIANTS}
    rules = (
        ("plain extrapolation at 8x is at most 0.20", far["plain"] <= 0.20),
        ("YaRN without training at 8x is at least 2.5 x plain extrapolation", far["yarn"] >= 2.5 * far["plain"]),
        ("YaRN after training at 8x is at least 2 x plain", far["yarn_trained"] >= 2 * far["plain_trained"]),
        ("YaRN after training at 8x is at least plain + 0.10", far["yarn_trained"] >= far["plain_trained"] + 0.10),
        ("the base length loses at most 0.05", near["yarn_trained"] >= near["plain"] - 0.05),
        ("bits per byte of the last half are 0.10 lower", bits["yarn_trained"] <= bits["plain_trained"] - 0.10),
    )
    return [rule for rule, holds in rules if not holds]


def lines(seed: int, recipe: Recipe, found: Results) -> list[str]:
    """Returns a table row per network: accuracy by length, and bits per byte of both ends."""
    rows = []
    for name in VARIANTS:
        each = found[name]
        label = NAMES[name].format(steps=recipe.long_steps)
        accuracy = " | ".join(f"{each.mean(length):.2f}" for length in LENGTHS)
        rows.append(f"| {seed} | {label} | {accuracy} | {each.first_bits:.2f} / {each.last_bits:.2f} |")
    return rows

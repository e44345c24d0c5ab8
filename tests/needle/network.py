"""Builds, trains and extends the needle test's network, with the project's own model and objective."""

from dataclasses import replace

import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from kernels.cross_entropy.reference import IGNORE
from model.config import ModelConfig, PlainRope, YarnRope
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.transformer import Transformer, initialize_weights
from tests.needle.rows import VOCAB_SIZE, Rows, is_key

BASE_LENGTH, FACTOR = 128, 8
LONG_LENGTH = BASE_LENGTH * FACTOR
TOKENS_PER_STEP = 2048
_BASE_RATE, _LONG_RATE = 6e-3, 2e-4

PLAIN = ModelConfig(
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


def build(config: ModelConfig, seed: int) -> Transformer:
    """Builds the network with the weights of a seed, in float32."""
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    initialize_weights(model, seed)
    return model


def with_rope(base: Transformer, config: ModelConfig) -> Transformer:
    """Returns a copy of a network with another rotary embedding."""
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    model.load_state_dict(base.state_dict())
    return model


def train(model: Transformer, steps: int, *, is_base: bool, seed: int) -> None:
    """Trains the network in place.

    Args:
        model: the network.
        steps: number of steps, each of 2,048 tokens.
        is_base: base training at length 128 from random weights; otherwise the extension at length 1,024.
        seed: of the rows.
    """
    length, rate = (BASE_LENGTH, _BASE_RATE) if is_base else (LONG_LENGTH, _LONG_RATE)
    rows = Rows(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _rate_share(step, steps, is_base=is_base)
        tokens_BT = rows.batch(TOKENS_PER_STEP // length, length)
        optimizer.zero_grad()
        loss_of(model, tokens_BT).backward()  # type: ignore[no-untyped-call]
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

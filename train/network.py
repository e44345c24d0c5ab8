"""Builds the part of a network that a rank holds, with the initial weights of the seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from comm.config import DispatchConfig
from comm.dispatch.registry import TokenSizes
from comm.protocol import ALONE, ContextGroup, Dispatcher, SequenceParts, zigzag_parts
from model.config import Computing, ModelConfig
from model.size import slice_lengths, slice_starts
from model.stage import Stage
from model.transformer import Part, Transformer, initialize_weights
from train.config import BatchConfig, Precision, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """The configuration of a replica, equal on all ranks.

    `tokens` are sizes of what a rank dispatches in a micro-batch. Without `seed`, weights are not initialized.
    """

    model: ModelConfig
    computing: Computing
    precision: Precision
    dispatch: DispatchConfig
    tokens: TokenSizes
    batch: BatchConfig
    pairing: Literal["overlapped", "sequential"]
    seed: int | None

    @classmethod
    def of_run(cls, config: TrainConfig) -> "ReplicaConfig":
        """Returns the configuration of the network that a run trains."""
        # A model in FP8 quantizes the rows that it sends, so the dispatcher must not quantize them again.
        is_fp8 = config.precision.kind == "fp8"
        return cls(
            model=config.model,
            computing=config.computing,
            precision=config.precision,
            dispatch=replace(config.dispatch, payload="full") if is_fp8 else config.dispatch,
            tokens=config.dispatch_site.tokens,
            batch=config.batch,
            pairing=config.schedule.pairing,
            seed=config.seed,
        )


def sequence_parts(config: ReplicaConfig, context: int, slices: int) -> SequenceParts:
    """Returns which tokens of a sequence each rank of a context group holds, or each slice."""
    length = config.batch.sequence_length_tokens
    if slices == 1:
        return zigzag_parts(length, context)
    lengths = slice_lengths(config.model, length, slices, is_fp8=config.precision.kind == "fp8")
    return SequenceParts(edges=slice_starts(lengths), held=tuple((index,) for index in range(slices)))


def link_shapes(config: ReplicaConfig, parts: SequenceParts, slices: int) -> tuple[tuple[int, int, int], ...]:
    """Returns the shapes of hidden states: of each slice, or of a rank's part of sequences."""
    batch = config.batch.micro_sequences
    hidden = config.model.hidden_size
    return tuple((batch, parts.tokens_of(index), hidden) for index in range(slices))


def build_model(
    config: ReplicaConfig,
    dispatcher: Dispatcher,
    part: Part,
    device: torch.device,
    context: ContextGroup = ALONE,
) -> Transformer:
    """Builds a part of a model on a device, with the initial weights of the seed if there is one."""
    dtype = weight_dtype(config.precision)
    model = Transformer(config.model, dispatcher, dtype, part, config.computing, context=context)
    if config.seed is not None:
        initialize_weights(model, config.seed)
    return model.to(device)


def build_stages(model: Transformer, held: set[int], cut: Sequence[range]) -> dict[int, Stage]:
    """Returns the stages that this rank holds, by number."""
    last = len(cut) - 1
    return {number: Stage(model, cut[number], first=number == 0, last=number == last) for number in sorted(held)}


def stage_part(model: ModelConfig, held: set[int], cut: Sequence[range], experts: range) -> Part:
    """Returns the part of a model that given stages need."""
    last = len(cut) - 1 in held
    layers = [layer for stage in sorted(held) for layer in cut[stage]]
    if last:
        layers += range(model.num_layers, model.num_layers + model.mtp_depth)
    # MTP modules read the embedding. Gradients of all its copies are summed over `Groups.embedding`.
    has_embedding = 0 in held or (last and model.mtp_depth > 0)
    return Part(layers=tuple(layers), experts=experts, embedding=has_embedding, head=last)


def held_experts(model: ModelConfig, num_parts: int, expert_index: int) -> range:
    """Returns the routed experts of every layer on a rank, by its index in a group of `num_parts` ranks."""
    per_rank = model.num_routed_experts // num_parts
    return range(expert_index * per_rank, (expert_index + 1) * per_rank)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Returns the type of weights and activations."""
    return {"float64": torch.float64, "float32": torch.float32}.get(precision.kind, torch.bfloat16)

"""Counts the weights of a model and of a rank, the cost of a token, and slices of equal work.

Imports no torch. Source: arXiv:2412.19437, section 4.2, and the released checkpoint.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod, sqrt
from typing import Literal

from kernels.operation import TILE, num_tiles
from model.config import ModelConfig

_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class StageShape:
    """Layers of a stage, and whether it holds the embedding or the heads."""

    layers: range
    is_first: bool
    is_last: bool


def stage_shapes(cut: Sequence[range]) -> tuple[StageShape, ...]:
    """Returns the stages into which a model is cut."""
    return tuple(
        StageShape(layers=layers, is_first=number == 0, is_last=number == len(cut) - 1)
        for number, layers in enumerate(cut)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMatrices:
    """Linear maps of a stage, listed on use: a hostile configuration can claim 10^9 layers."""

    config: ModelConfig
    stage: StageShape
    num_local_experts: int

    @property
    def dense(self) -> list[tuple[int, int, int]]:
        """Stacks of equal matrices without routed experts: number, outputs, inputs."""
        config = self.config
        num_dense, num_sparse = self._num_layers()
        maps = [*attention_maps(config) * (num_dense + num_sparse), *dense_maps(config) * num_dense]
        maps += mlp_maps(config.hidden_size, config.num_shared_experts * config.expert_intermediate_size) * num_sparse
        maps += [(config.hidden_size, 2 * config.hidden_size)] * (config.mtp_depth * self.stage.is_last)
        return [(1, *shape) for shape in maps]

    @property
    def experts(self) -> list[tuple[int, int, int]]:
        """Stacks of equal matrices of routed experts: number, outputs, inputs."""
        gate = (self.config.expert_intermediate_size, self.config.hidden_size)
        stacks = [(2 * self.num_local_experts, *gate), (self.num_local_experts, *gate[::-1])]
        return stacks * self._num_layers()[1]

    @property
    def num_dense(self) -> int:
        """Number of weights without routed experts."""
        return sum(number * rows * columns for number, rows, columns in self.dense)

    def _num_layers(self) -> tuple[int, int]:
        """Returns the number of dense layers, and of layers and MTP modules with routed experts."""
        layers = self.stage.layers
        dense = max(0, min(layers.stop, self.config.num_dense_layers) - layers.start)
        return dense, len(layers) - dense + self.config.mtp_depth * self.stage.is_last


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldParameters:
    """Weights on a rank.

    Attributes:
        ordinary: number of weights, without routed experts.
        embedding: number of those that are the embedding's.
        routed: number of weights of routed experts.
        num_blocks: number of layers and MTP modules.
        num_routers: number of those that have a router.
        code_bytes: bytes of all linear maps in FP8, each in the two orders that products read.
        matrices: linear maps of each stage.
    """

    ordinary: int
    embedding: int
    routed: int
    num_blocks: int
    num_routers: int
    code_bytes: int
    matrices: tuple[StageMatrices, ...] = ()

    @property
    def total(self) -> int:
        """Number of all weights."""
        return self.ordinary + self.routed

    def split(self, config: ModelConfig, ranks: int) -> "HeldParameters":
        """Returns the weights of each of several ranks that split heads and widths, but no routed expert.

        Each holds all norms, routers and projections to latents, as in Megatron-LM.
        """
        if ranks == 1:
            return self
        latents = sum(config.latents.values())
        whole = config.hidden_size * (self.num_blocks * (latents + 2) + self.num_routers * config.num_routed_experts)
        routed_codes = min(self.code_bytes, 2 * self.routed)
        return replace(
            self,
            ordinary=whole + (self.ordinary - whole) // ranks,
            embedding=self.embedding // ranks,
            code_bytes=routed_codes + (self.code_bytes - routed_codes) // ranks,
        )


def held_parameters(config: ModelConfig, stages: Iterable[StageShape], num_local_experts: int) -> HeldParameters:
    """Counts the weights of some stages.

    Args:
        stages: stages that the rank holds, each once.
        num_local_experts: routed experts of each layer that the rank holds.
    """
    stages = list(stages)
    hidden = config.hidden_size
    heads = sum(stage.is_last for stage in stages)
    modules = config.mtp_depth * heads
    dense = sum(max(0, min(stage.layers.stop, config.num_dense_layers) - stage.layers.start) for stage in stages)
    sparse = sum(len(stage.layers) for stage in stages) - dense + modules
    attention = attention_maps(config)
    mlp = dense_maps(config)
    expert = expert_maps(config)
    shared = shared_maps(config)

    ordinary = (dense + sparse) * (attention_parameters(config) + 2 * hidden) + dense * _num_weights(mlp)
    ordinary += sparse * (_num_weights(shared) + hidden * config.num_routed_experts)
    # A projection of two inputs, and three norms.
    ordinary += modules * (2 * hidden * hidden + 3 * hidden)
    has_embedding = any(stage.is_first or (stage.is_last and config.mtp_depth) for stage in stages)
    embedding = config.vocab_size * hidden * has_embedding
    ordinary += embedding + (config.num_head_rows * hidden + hidden) * heads

    codes = (dense + sparse) * _code_bytes(attention) + dense * _code_bytes(mlp)
    codes += sparse * (_code_bytes(shared) + num_local_experts * _code_bytes(expert))
    return HeldParameters(
        ordinary=ordinary,
        embedding=embedding,
        routed=sparse * num_local_experts * _num_weights(expert),
        num_blocks=dense + sparse,
        num_routers=sparse,
        code_bytes=codes,
        matrices=tuple(
            StageMatrices(config=config, stage=stage, num_local_experts=num_local_experts) for stage in stages
        ),
    )


def attention_parameters(config: ModelConfig) -> int:
    """Counts the weights of one layer's attention, including its norms."""
    return sum(prod(shape) for _, shape in config.attention_weights)


def attention_maps(config: ModelConfig) -> list[tuple[int, int]]:
    """Returns outputs and inputs of the linear maps of attention."""
    return [(shape[0], shape[1]) for _, shape in config.attention_weights if len(shape) == 2]


def dense_maps(config: ModelConfig) -> list[tuple[int, int]]:
    """Returns outputs and inputs of the linear maps of a dense MLP."""
    return mlp_maps(config.hidden_size, config.dense_intermediate_size)


def expert_maps(config: ModelConfig) -> list[tuple[int, int]]:
    """Returns outputs and inputs of the linear maps of one expert."""
    return mlp_maps(config.hidden_size, config.expert_intermediate_size)


def shared_maps(config: ModelConfig) -> list[tuple[int, int]]:
    """Returns outputs and inputs of the linear maps of a layer's shared experts together."""
    return mlp_maps(config.hidden_size, config.num_shared_experts * config.expert_intermediate_size)


def mlp_maps(hidden: int, width: int) -> list[tuple[int, int]]:
    """Returns outputs and inputs of the linear maps of a SwiGLU network, none if it has no width."""
    return [(width, hidden), (width, hidden), (hidden, width)] if width else []


def _num_weights(maps: Iterable[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in maps)


def _code_bytes(maps: Iterable[tuple[int, int]]) -> int:
    """Returns the bytes of maps in FP8, with a scale for every 128 x 128 block, in both orders."""
    return sum(2 * (rows * columns + _SCALE_BYTES * num_tiles(rows) * num_tiles(columns)) for rows, columns in maps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterAccount:
    """Weights of a model. MTP modules are counted apart: embedding and head belong to the main model.

    Attributes:
        total: weights of the main model.
        active: weights of the main model that one token uses, including both embeddings.
        active_without_embedding: `active` without the input embedding, of which a token uses one row.
        attention: weights of one layer's attention.
        expert: weights of one routed expert.
        mtp: weights of all MTP modules.
    """

    total: int
    active: int
    active_without_embedding: int
    attention: int
    expert: int
    mtp: int


def count_parameters(config: ModelConfig) -> ParameterAccount:
    """Counts the weights of an architecture."""
    one_stage = [StageShape(layers=range(config.num_layers), is_first=True, is_last=True)]
    with_mtp = held_parameters(config, one_stage, config.num_routed_experts)
    main = held_parameters(replace(config, mtp_depth=0), one_stage, config.num_routed_experts)
    active = held_parameters(replace(config, mtp_depth=0), one_stage, config.num_experts_per_token).total
    return ParameterAccount(
        total=main.total,
        active=active,
        active_without_embedding=active - main.embedding,
        attention=attention_parameters(config),
        expert=_num_weights(expert_maps(config)),
        mtp=with_mtp.total - main.total,
    )


def training_flops_per_token(config: ModelConfig, sequence_length_tokens: int) -> float:
    """Counts floating-point operations of forward and backward for one token of the main model.

    Six per active weight, and six per multiplication of scores and mixing over half the sequence, as attention is
    causal.
    """
    attended = sequence_length_tokens / 2
    per_layer = config.num_heads * (config.qk_head_dim + config.value_head_dim) * attended
    return 6 * count_parameters(config).active_without_embedding + 6 * config.num_layers * per_layer


_OWN_PRODUCTS = 1.6
_FP8_PRODUCTS = 1.15
_SCORES = 1.75
"""Time of a multiplication in linear maps of layers (in the weights' type and in FP8) and in attention's scores and
mixing, relative to one in an output head, whose large product runs fastest.

From the public trace of DeepSeek-V3's training (github.com/deepseek-ai/profile-data): 31.1 ms for a MoE layer, of which
5.5 ms are scores and mixing, and 8.3 ms are norms, casts and recomputation. A head takes about 35 ms. In FP8, products
of layers are about twice as fast as in bf16, but casts are added.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartWork:
    """Relative time of forward and backward of one token, with a multiplication in a head as the unit.

    Attributes:
        embedding: of one look-up.
        dense: of a dense layer.
        moe: of a MoE layer, without exchange.
        head: of the main output head.
        mtp: of all MTP modules with their heads.
    """

    embedding: float
    dense: float
    moe: float
    head: float
    mtp: float

    def total(self, config: ModelConfig) -> float:
        """Returns the work of the whole model."""
        layers = config.num_dense_layers * self.dense + (config.num_layers - config.num_dense_layers) * self.moe
        return self.embedding + layers + self.head + self.mtp


def count_work(config: ModelConfig, sequence_length_tokens: int, *, is_fp8: bool, context: int = 1) -> PartWork:
    """Counts the relative time of each part of a model.

    Args:
        sequence_length_tokens: tokens of a whole sequence. Attention is causal, so a token attends to half of it.
        is_fp8: whether products of linear maps in layers are in FP8. Those of heads never are.
        context: ranks that share each sequence; each expands the keys and values of all tokens.
    """
    hidden = config.hidden_size
    expert = _num_weights(expert_maps(config))
    products = _FP8_PRODUCTS if is_fp8 else _OWN_PRODUCTS
    scores = config.num_heads * (config.qk_head_dim + config.value_head_dim) * sequence_length_tokens / 2
    expanded = prod(config.expanded_map or (0,))
    attention = attention_parameters(config) + (context - 1) * expanded
    active = (config.num_experts_per_token + config.num_shared_experts) * expert + hidden * config.num_routed_experts
    moe = products * (attention + active) + _SCORES * scores
    head = config.num_head_rows * hidden
    return PartWork(
        embedding=hidden,
        dense=products * (attention + _num_weights(dense_maps(config))) + _SCORES * scores,
        moe=moe,
        head=head,
        mtp=config.mtp_depth * (moe + 2 * hidden * hidden + head),
    )


_TILES_PER_SLICE = 8
"""Slices of at least so many tiles end at a tile's border, so that products in FP8 have whole tiles."""


def slice_lengths(
    config: ModelConfig,
    sequence_length_tokens: int,
    slices: int,
    *,
    is_fp8: bool,
    equal: Literal["work", "length"] = "work",
    context: int = 1,
) -> tuple[int, ...]:
    """Returns the tokens of each slice of a sequence, so that all slices have about equal work or length.

    A later token attends to more tokens, so later slices are shorter. The lengths depend on the model because the share
    of attention does.

    Args:
        slices: number of slices, at least 1.
        is_fp8: whether products of linear maps in layers are in FP8.
        context: ranks that share each slice, of which each holds two segments of equal length.

    Raises:
        ValueError: a slice, or a segment of it, would have no token.
    """
    length = sequence_length_tokens
    if slices == 1:
        return (length,)
    segments = 2 * context if context > 1 else 1
    most = length // segments
    if not 1 <= slices <= most:
        tokens = "tokens" if context == 1 else f"groups of {segments} tokens"
        raise ValueError(f"must be in 1 to {most}, the {tokens} of a sequence, is {slices}; nearest valid: {most}")
    fixed = count_work(config, 0, is_fp8=is_fp8).total(config)
    # The first x tokens cost fixed * x + growth * x^2 / 2.
    growth = 2 * (count_work(config, length, is_fp8=is_fp8).total(config) - fixed) / length
    total_work = fixed * length + growth * length**2 / 2
    tiles = TILE * context
    unit = tiles if length >= slices * _TILES_PER_SLICE * tiles else segments
    ends = [0]
    for index in range(1, slices):
        work = total_work * index / slices
        if equal == "length":
            end = length * index / slices
        else:
            end = (sqrt(fixed**2 + 2 * growth * work) - fixed) / growth if growth else work / fixed
        # Every slice keeps at least one unit.
        ends.append(min(max(round(end / unit) * unit, ends[-1] + unit), length - (slices - index) * unit))
    return tuple(after - before for before, after in pairwise([*ends, length]))

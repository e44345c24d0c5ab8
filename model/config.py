"""Architecture of a model, a ladder of small models, its split into stages, and the policy loss.

Imports no torch: commands read this and reject an invalid split before any process starts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from base.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from base.registry import Registry
from kernels.attention import ATTENTION
from kernels.router_scores import ROUTERS

BLOCK_TOKENS = 64
"""Tokens of a block, in which the cache of attention is divided among sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainRope:
    """Rotary embedding with unchanged frequencies."""

    kind: Literal["plain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnRope:
    """YaRN: frequencies interpolated for a longer context (arXiv:2309.00071; arXiv:2412.19437, 4.3)."""

    kind: Literal["yarn"]
    factor: PositiveFloat
    original_max_position_tokens: PositiveInt
    beta_fast: PositiveFloat
    beta_slow: PositiveFloat
    mscale: NonNegativeFloat
    mscale_all_dim: NonNegativeFloat


RopeScaling = PlainRope | YarnRope


def yarn_temperature(factor: float, mscale: float) -> float:
    """Returns the temperature by which YaRN scales, 1 without an extension."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


Recomputed = Literal["norm", "mla_up", "swiglu", "layer"]
RECOMPUTED: tuple[Recomputed, ...] = ("norm", "mla_up", "swiglu")
"""Outputs that a backward may recompute instead of keeping them: those of RMSNorms, of MLA's up-projections (queries,
keys and values), and of SwiGLU gates (arXiv:2412.19437, section 3.2.3)."""
LAYER: Recomputed = "layer"
"""All outputs of a layer except those of the attention kernel. It includes all others."""


def all_recomputed(chosen: Iterable[Recomputed]) -> frozenset[Recomputed]:
    """Returns everything that is recomputed, given the chosen kinds: `layer` includes all others."""
    kinds = frozenset(chosen)
    return kinds | frozenset(RECOMPUTED) if LAYER in kinds else kinds


HeadKind = Literal["tokens", "score"]
"""Kind of output head: logits of the vocabulary, or one score of a token (a reward model, which has no MTP modules)."""

Products = Literal["own", "fp8", "fp8_power_of_two"]
"""Precision of the products of linear maps: the weights' own type, or FP8 with scales of any value or only powers
of two (arXiv:2412.19437, section 3.3)."""

BalanceOver = Literal["sequence", "micro_batch"]
"""Tokens over which the balance loss counts choices: each sequence's, or those of a micro-batch."""

InferencePrecision = Literal["float64", "float32", "bf16", "fp8", "fp8_power_of_two"]
"""Type of weights that are not trained; with products in FP8 it is bf16."""


def products_of(precision: InferencePrecision) -> Products:
    """Returns the precision of products that weights of a precision have."""
    return precision if precision == "fp8" or precision == "fp8_power_of_two" else "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class Computing:
    """Options for computing a model: only `balance_over` changes results by more than rounding.

    Attributes:
        recomputed: what a backward computes again. Products in FP8 always recompute all but `layer`, and keep the
            products' inputs in FP8 instead.
        gradient_blocks: products in FP8 read output gradients with a scale for each 128 x 128 numbers.
        products: precision of attention, feed-forward networks and experts; other products stay in the weights' type.
    """

    recomputed: frozenset[Recomputed] = frozenset(("norm", "swiglu"))
    attention: Annotated[str, ATTENTION] = "auto"
    products: Products = "own"
    gradient_blocks: bool = False
    balance_over: BalanceOver = "sequence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "recomputed", all_recomputed(self.recomputed))

    @property
    def recomputed_names(self) -> tuple[Recomputed, ...]:
        """Everything that a backward computes again, in order, with what products in FP8 always recompute."""
        names = self.recomputed if self.products == "own" else self.recomputed.union(RECOMPUTED)
        return tuple(sorted(names))


RELEASED_GROUP_SCORES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionForm:
    """A form of attention. Its weights and widths are properties of `config`.

    Attributes:
        config: dataclass of models of this form: the keys of all models, and the form's own.
        build: function of a model, the type of weights, the name of a kernel, and `Linears`: one layer's `Attention`.
        small: the form's own keys in small models of tests and of `launch.verify`.
        takes_parts: whether ranks may share sequences, or slices divide them.
        has_fp8: whether its products can be in FP8.
    """

    summary: str
    config: "type[ModelConfig]"
    build: Callable[..., Any]
    small: Mapping[str, Any]
    takes_parts: bool = False
    has_fp8: bool = False


ATTENTION_FORMS = Registry[AttentionForm]("model.attention", ("model.attention.forms",))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The keys of every architecture, and what cost, memory and files need to know of its attention.

    The form of attention names the subclass that a mapping is decoded to. Source: arXiv:2412.19437, section 2; fields
    follow the released config.json. `mtp_hidden` selects the state of the previous depth that an MTP module reads,
    after or before the norm that precedes the output head.
    """

    DECODED_BY: ClassVar = ("attention", ATTENTION_FORMS)
    ROTATED: ClassVar[str]
    """Key of the number of values per head that rotate."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_dense_layers: NonNegativeInt
    dense_intermediate_size: PositiveInt
    num_heads: PositiveInt
    num_routed_experts: PositiveInt
    num_shared_experts: NonNegativeInt
    num_experts_per_token: PositiveInt
    expert_intermediate_size: PositiveInt
    num_expert_groups: PositiveInt
    num_limited_groups: PositiveInt
    routed_scaling_factor: PositiveFloat
    norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rope_scaling: RopeScaling
    max_position_tokens: PositiveInt
    mtp_depth: NonNegativeInt
    mtp_hidden: Literal["post_norm", "pre_norm"]
    initializer_range: PositiveFloat
    head: HeadKind
    # biased scores that add up to a group's; None: K / M for K experts per token from M groups.
    group_score_experts: PositiveInt | None = None
    router: Annotated[str, ROUTERS] = "sigmoid"
    attention: Annotated[str, ATTENTION_FORMS] = "mla"

    @property
    def num_group_scores(self) -> int:
        """Number of biased scores that add up to a group's (arXiv:2412.19437, section 2.1.2)."""
        return self.group_score_experts or max(1, self.num_experts_per_token // self.num_limited_groups)

    @property
    def is_released_routing(self) -> bool:
        """Whether the released code, which always adds two scores of a group, chooses the same experts."""
        size = self.num_routed_experts // self.num_expert_groups
        is_limited = self.num_limited_groups < self.num_expert_groups
        return not is_limited or min(self.num_group_scores, size) == min(RELEASED_GROUP_SCORES, size)

    @property
    def num_head_rows(self) -> int:
        """Number of rows of the output head's matrix."""
        return self.vocab_size if self.head == "tokens" else 1

    @property
    def rotated_dim(self) -> int:
        """Number of values per head that rotate with the position."""
        value: int = getattr(self, self.ROTATED)
        return value

    @property
    def qk_head_dim(self) -> int:
        """Number of values per head in a query or key."""
        raise NotImplementedError

    @property
    def value_head_dim(self) -> int:
        """Number of values per head that are mixed."""
        raise NotImplementedError

    @property
    def cached_values(self) -> int:
        """Number of values that a layer caches of a token."""
        raise NotImplementedError

    @property
    def cached_score_dim(self) -> int:
        """Number of multiplications per head of a new token with one cached token."""
        return self.qk_head_dim + self.value_head_dim

    @property
    def attention_weights(self) -> list[tuple[str, tuple[int, ...]]]:
        """Released names below `self_attn.`, without `.weight`, and shapes of one layer's weights."""
        raise NotImplementedError

    @property
    def latents(self) -> dict[str, int]:
        """Widths of latents by the weight that gives them; ranks that split heads have each of these whole."""
        return {}

    @property
    def expanded_map(self) -> tuple[int, int] | None:
        """Outputs and inputs of the map that ranks of a context group apply to all cached values, or None."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig(ModelConfig):
    """A model with latent attention (arXiv:2412.19437, section 2.1.1).

    `q_lora_rank` None means one full query projection.
    """

    ROTATED: ClassVar[str] = "qk_rope_head_dim"

    q_lora_rank: PositiveInt | None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt

    @property
    def qk_head_dim(self) -> int:
        """Number of values per head in a query or key: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        """Number of values per head that are mixed."""
        return self.v_head_dim

    @property
    def cached_values(self) -> int:
        """Number of values that a layer caches of a token: 512 + 64 = 576 for DeepSeek-V3."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cached_score_dim(self) -> int:
        """Number of multiplications per head of a new token with one cached token, in the absorbed form."""
        return 2 * self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def attention_weights(self) -> list[tuple[str, tuple[int, ...]]]:
        """Implements `ModelConfig.attention_weights`."""
        hidden, latent, rank = self.hidden_size, self.kv_lora_rank, self.q_lora_rank
        queries = self.num_heads * self.qk_head_dim
        return [
            *(
                [("q_proj", (queries, hidden))]
                if rank is None
                else [("q_a_proj", (rank, hidden)), ("q_a_layernorm", (rank,)), ("q_b_proj", (queries, rank))]
            ),
            ("kv_a_proj_with_mqa", (self.cached_values, hidden)),
            ("kv_a_layernorm", (latent,)),
            ("kv_b_proj", self.expanded_map),
            ("o_proj", (hidden, self.num_heads * self.v_head_dim)),
        ]

    @property
    def latents(self) -> dict[str, int]:
        """Implements `ModelConfig.latents`."""
        queries = {} if self.q_lora_rank is None else {"q_a_proj": self.q_lora_rank}
        return {**queries, "kv_a_proj_with_mqa": self.cached_values}

    @property
    def expanded_map(self) -> tuple[int, int]:
        """Outputs and inputs of the map that expands latents to keys without position, and values."""
        return self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class GqaConfig(ModelConfig):
    """A model with grouped-query attention (arXiv:2305.13245).

    Rotates whole heads by halves, as Qwen3 does.
    """

    ROTATED: ClassVar[str] = "head_dim"

    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    qk_norm: bool

    @property
    def qk_head_dim(self) -> int:
        """Number of values per head in a query or key."""
        return self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Number of values per head that are mixed."""
        return self.head_dim

    @property
    def cached_values(self) -> int:
        """Number of values that a layer caches of a token: keys and values of all their heads."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def attention_weights(self) -> list[tuple[str, tuple[int, ...]]]:
        """Implements `ModelConfig.attention_weights`."""
        hidden, shared = self.hidden_size, self.num_kv_heads * self.head_dim
        queries = self.num_heads * self.head_dim
        maps = [("q_proj", (queries, hidden)), ("k_proj", (shared, hidden)), ("v_proj", (shared, hidden))]
        norms = [("q_norm", (self.head_dim,)), ("k_norm", (self.head_dim,))] if self.qk_norm else []
        return [*maps, ("o_proj", (hidden, queries)), *norms]


ModelT = TypeVar("ModelT", bound=ModelConfig)


def with_released_routing(config: ModelT) -> ModelT:
    """Returns an architecture that chooses experts as the released code does."""
    return config if config.is_released_routing else replace(config, group_score_experts=RELEASED_GROUP_SCORES)


_WIDTH = 64
_NOPE_DIM = 64
# Below each size: number of routed experts, experts per token, groups, and groups per token.
_EXPERTS = ((3, (16, 4, 4, 2)), (6, (32, 4, 4, 2)))
_MANY_EXPERTS = (64, 8, 8, 4)
_LARGEST_VOCABULARY = 32768


def ladder(size: int) -> MlaConfig:
    """Returns the model of a size of at least 1: 1 has 0.8M weights, 4 has 22M, 16 has 1B.

    It keeps these proportions of DeepSeek-V3 (arXiv:2412.19437, section 4.2): a head has twice as many dimensions
    without position as with it; the values of all heads together are wider than the hidden state; latents are narrow; a
    dense layer is as wide as all experts of a token together; one layer in twenty, but at least one, is dense; one
    shared expert; a router that keeps half of the groups; one MTP module.
    """
    assert size >= 1
    hidden = _WIDTH * size
    num_layers = size + 2
    experts, per_token, groups, limited = next((row for limit, row in _EXPERTS if size < limit), _MANY_EXPERTS)
    width = 2 * hidden // per_token
    return MlaConfig(
        vocab_size=min(4096 << size // 4, _LARGEST_VOCABULARY),
        hidden_size=hidden,
        num_layers=num_layers,
        num_dense_layers=max(1, num_layers // 20),
        dense_intermediate_size=(per_token + 1) * width,
        num_heads=2 * size,
        q_lora_rank=hidden // 4,
        kv_lora_rank=max(32, hidden // 8),
        qk_nope_head_dim=_NOPE_DIM,
        qk_rope_head_dim=_NOPE_DIM // 2,
        v_head_dim=_NOPE_DIM,
        num_routed_experts=experts,
        num_shared_experts=1,
        num_experts_per_token=per_token,
        expert_intermediate_size=width,
        num_expert_groups=groups,
        num_limited_groups=limited,
        routed_scaling_factor=2.5,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=PlainRope(kind="plain"),
        max_position_tokens=4096,
        mtp_depth=1,
        mtp_hidden="post_norm",
        initializer_range=0.02,
        head="tokens",
    )


class CutError(ValueError):
    """A model that cannot be cut into the requested stages."""


def cut_layers(num_layers: int, num_stages: int, mtp_depth: int = 0, *, stages_per_rank: int = 1) -> tuple[range, ...]:
    """Cuts layers into contiguous, nearly equal stages; the first ones get the remainder.

    An MTP module counts as one layer of the last stage. Errors use `stages_per_rank` to name the nearest pipeline size.

    Raises:
        CutError: fewer layers than stages.
    """
    if num_layers < num_stages:
        shorter = num_layers // stages_per_rank
        raise CutError(
            f"model.num_layers: {num_layers} layers cannot be cut into {num_stages} pipeline stages of at least one "
            f"layer; nearest valid: model.num_layers={num_stages}"
            f"{f' or parallelism.pipeline={shorter}' if shorter else ''}"
        )
    last = max(1, min(num_layers - (num_stages - 1), (num_layers + mtp_depth) // num_stages - mtp_depth))
    sizes = [num_layers] if num_stages == 1 else [*_share(num_layers - last, num_stages - 1), last]
    stages = []
    first = 0
    for size in sizes:
        stages.append(range(first, first + size))
        first += size
    return tuple(stages)


def cut_at(sizes: Sequence[int]) -> tuple[range, ...]:
    """Returns the layers of each stage, given their numbers."""
    firsts = accumulate(sizes, initial=0)
    return tuple(range(first, first + size) for first, size in zip(firsts, sizes, strict=False))


def _share(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossConfig:
    """The loss of sampled answers with advantages, of which every published variant is a choice of values.

    A ratio is the probability of tokens under the policy divided by that under the old policy. `conf/task/loss`
    explains the keys; None means no bound.

    Attributes:
        ratio: with one ratio for an answer, each token has an equal share of the answer's surrogate (GSPO, V3's
            report).
        surrogate: min(ratio A, clip(ratio) A), or min(ratio, largest_ratio) A log p with a constant weight (CISPO).
        kl: estimator of the divergence from the reference, by its gradient on answers of the policy itself. With q =
            reference / policy: ratio (q - log q - 1) (reverse), (log q)^2 / 2 (reverse_squared), or q - log q - 1
            (forward). It has each token's own ratio; forward_answer is forward with one q for the whole answer, the
            product over its tokens (V3's report).
        off_policy_limit: an answer with negative advantage has no surrogate if the mean over its tokens of
            log(sampler / policy) is above this (DeepSeek-V3.2).
        sampler_ratio_cap: bound of the ratio of old policy to sampler, which weighs the surrogate of each token.
    """

    advantage: Literal["standardized", "centered"]
    ratio: Literal["token", "sequence_mean", "sequence_product"]
    surrogate: Literal["clipped", "weighted"]
    clip_low: NonNegativeFloat | None
    clip_high: NonNegativeFloat | None
    largest_ratio: PositiveFloat | None
    normalizer: Literal["answers", "tokens", "length", "sums"]
    kl: Literal["reverse", "reverse_squared", "forward", "forward_answer", "none"]
    kl_weight: NonNegativeFloat
    off_policy_limit: NonNegativeFloat | None
    sampler_ratio_cap: PositiveFloat | None
    equal_groups: Literal["count", "leave_out"] = "count"

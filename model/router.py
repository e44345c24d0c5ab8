"""Router: experts of each token by `kernels.router`, their load and balance loss, and forced choices.

Source: arXiv:2412.19437, sections 2.1.2 and 4.2; arXiv:2408.15664, algorithm 1. Shape legend: N tokens in all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from comm.protocol import ALONE, ContextGroup, Label
from kernels.attention.documents import Documents
from kernels.router import route, route_backward
from kernels.router.reference import RouteLimits
from model.config import BalanceOver, ModelConfig
from model.linear import widen
from model.slices import SliceContext

FREE_CHOICE = -1
"""Forced id of each choice of a token whose experts the router chooses itself."""


class RouteError(ValueError):
    """Tokens cannot be sent to these experts."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Chosen experts of each token, int64; weights and scores without bias are float32 or wider."""

    ids_TK: Tensor
    weights_TK: Tensor
    scores_BTE: Tensor

    def balance(
        self, documents: Documents | None = None, context: ContextGroup = ALONE, over: BalanceOver = "sequence"
    ) -> Tensor:
        """Returns this rank's part of the sum over sequences of sum_i f_i P_i, unscaled.

        f comes from plain top-k of unbiased scores, without gradient. It counts the tokens of all ranks that share a
        sequence. A document that is masked from others counts as a sequence; padding does not. Over a micro-batch, all
        its tokens count as one sequence, times the number of its sequences (arXiv:2412.19437, section 4.5.3).
        """
        if documents is None and over == "sequence" and not isinstance(context, SliceContext):
            return self._balance_of_sequences(context)
        scores_NE = self.scores_BTE.flatten(0, 1)
        num_experts, num_chosen = self._sizes
        numbers_N, lengths_S, num_sequences = self._token_sets(documents, context, over)
        shares_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        counts_SE = self._count_choices(numbers_N, len(lengths_S))
        # One factor 1 / T is f's, the other P's.
        factor = num_experts / num_chosen * num_sequences
        if isinstance(context, SliceContext):
            return context.balance(shares_NE, numbers_N, counts_SE, factor / lengths_S**2)
        factors_SE = context.sum(counts_SE) * factor / lengths_S[:, None] ** 2
        return (factors_SE[numbers_N] * shares_NE).sum()

    def _balance_of_sequences(self, context: ContextGroup) -> Tensor:
        # f_i: how often the top k of a sequence contain an expert, times E / (K T): [B, E].
        scores_BTE = self.scores_BTE
        num_experts, num_chosen = self._sizes
        tokens = context.parts(scores_BTE.shape[1]).num_tokens
        top_BTK = scores_BTE.detach().topk(num_chosen, -1, sorted=False).indices
        counts_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(
            1, top_BTK.flatten(1), torch.ones_like(top_BTK.flatten(1), dtype=scores_BTE.dtype)
        )
        slopes_BE = context.sum(counts_BE) * (num_experts / (num_chosen * tokens**2))
        # P_i: mean normalized score of an expert in a sequence. Only it has a gradient.
        balance: Tensor = _WeightedShares.apply(scores_BTE, slopes_BE)  # type: ignore[no-untyped-call]
        return balance

    def _token_sets(
        self, documents: Documents | None, context: ContextGroup, over: BalanceOver
    ) -> tuple[Tensor, Tensor, int]:
        """Returns each token's set, the number of tokens of each set, and the sequences that a set stands for."""
        batch, tokens = self.scores_BTE.shape[:2]
        parts = context.parts(tokens)
        if documents is None:
            # Without documents, each sequence of the micro-batch counts as one.
            numbers_N = torch.arange(batch, device=self.scores_BTE.device).repeat_interleave(tokens)
            lengths_S = self.scores_BTE.new_full((batch,), parts.num_tokens)
        else:
            numbers_N = parts.take(documents.numbers_BT, context.index).flatten()
            # The last one is all padding, which has no part in the loss.
            lengths_S = documents.lengths.to(self.scores_BTE.dtype)
            lengths_S[-1] = torch.inf
        if over == "sequence":
            return numbers_N, lengths_S, 1
        num_sequences = batch if documents is None else documents.num_real
        # Set 0 has all tokens, and set 1 the padding.
        total = lengths_S[:num_sequences].sum().clamp(min=1)
        lengths = torch.stack((total, torch.full_like(total, torch.inf)))
        return (numbers_N >= num_sequences).long(), lengths, num_sequences

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.scores_BTE.shape[2], self.ids_TK.shape[1]

    def _count_choices(self, numbers_N: Tensor, num_sequences: int) -> Tensor:
        """Counts how often the tokens of each sequence choose each expert, given each token's sequence."""
        scores_NE = self.scores_BTE.detach().flatten(0, 1)
        num_experts, num_chosen = self._sizes
        # One flat table of (sequence, expert), so that a single scatter counts everything without a host sync.
        places_NK = numbers_N[:, None] * num_experts + scores_NE.topk(num_chosen, -1, sorted=False).indices
        counts = scores_NE.new_zeros(num_sequences * num_experts)
        counts.scatter_add_(0, places_NK.flatten(), torch.ones_like(places_NK.flatten(), dtype=counts.dtype))
        return counts.view(num_sequences, num_experts)


class _WeightedShares(torch.autograd.Function):
    """Sums slopes * scores / sum(scores) over tokens, with a gradient of few operations."""

    @staticmethod
    def forward(ctx: Any, scores_BTE: Tensor, slopes_BE: Tensor) -> Tensor:
        sums_BT1 = scores_BTE.sum(-1, keepdim=True)
        # Weighted mean of the slopes for each token: [B, T, 1].
        means_BT1 = torch.bmm(scores_BTE, slopes_BE.unsqueeze(-1)).div_(sums_BT1)
        ctx.save_for_backward(slopes_BE, sums_BT1, means_BT1)
        return means_BT1.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        slopes_BE, sums_BT1, means_BT1 = ctx.saved_tensors
        # A score's slope is by how much its own exceeds the mean, divided by the sum.
        return (slopes_BE.unsqueeze(1) - means_BT1).mul_(grads[0] / sums_BT1), None


class _Route(torch.autograd.Function):
    """Runs the router's kernels; choices have no gradient, weights and scores do."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTE: Tensor, bias_E: Tensor, limits: RouteLimits, load_E: Tensor | None, ids_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen_TK, weights_TK, scores_TE = route(logits_BTE.flatten(0, 1), bias_E, limits, load_E, ids_TK)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen_TK)
        scores_BTE = scores_TE.view_as(logits_BTE)
        ctx.save_for_backward(chosen_TK, weights_TK, scores_BTE)
        ctx.limits = limits
        return chosen_TK, weights_TK, scores_BTE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        chosen_TK, weights_TK, scores_BTE = ctx.saved_tensors
        _, grad_weights_TK, grad_scores_BTE = grads
        if grad_weights_TK is None:
            grad_weights_TK = torch.zeros_like(weights_TK)
        grad_scores_TE = None if grad_scores_BTE is None else grad_scores_BTE.flatten(0, 1)
        saved = (chosen_TK, weights_TK, scores_BTE.flatten(0, 1))
        grad_TE = route_backward(grad_weights_TK, *saved, grad_scores_TE, ctx.limits)
        return grad_TE.view_as(scores_BTE), None, None, None, None


Route = Callable[["Router", Tensor], Routing]
"""Chooses experts in a router's place, from its logits."""


class Router(nn.Module):
    """Chooses each token's experts. The correction bias only affects the choice and gets no gradient."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self._config = config
        self._limits = RouteLimits(
            config.num_experts_per_token,
            config.num_expert_groups,
            config.num_limited_groups,
            config.routed_scaling_factor,
            config.num_group_scores,
            config.router,
        )
        self.weight = nn.Parameter(torch.empty(config.num_routed_experts, config.hidden_size, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_routed_experts))
        self.register_buffer("load", torch.zeros(config.num_routed_experts, dtype=torch.int64), persistent=False)

    @property
    def id_dtype(self) -> torch.dtype:
        """Type that stores ids of experts in as few bytes as their number requires."""
        return expert_id_dtype(self._config.num_routed_experts)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Routes every token by its normalized state."""
        return self.route(functional.linear(widen(x_BTD), widen(self.weight)))

    def route(self, logits_BTE: Tensor, forced_ids_TK: Tensor | None = None) -> Routing:
        """Routes every token by its logits; adds this rank's choices to `load` when gradients are recorded.

        Args:
            forced_ids_TK: int64, experts to choose independent of their scores, which still determine the weights. The
                router chooses for a token whose ids are all -1, and for all tokens if this is None.

        Raises:
            RouteError: forced ids are neither K different experts nor K times -1 for each token.
        """
        ids_TK = None if forced_ids_TK is None else self._force(logits_BTE, forced_ids_TK)
        return self._route(logits_BTE, self.load if torch.is_grad_enabled() else None, ids_TK)

    def route_again(self, logits_BTE: Tensor, ids_TK: Tensor) -> Routing:
        """Returns the routing of choices that `route` made from the same logits. `load` has them already."""
        return self._route(logits_BTE, None, ids_TK)

    def update_bias(self, load_E: Tensor, rate: float) -> None:
        """Raises the bias of experts below the mean load and lowers that of others, by `rate` (V3: 1e-3)."""
        # Only the sign of the deviation counts (arXiv:2408.15664, algorithm 1).
        load = load_E.to(torch.float64)
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load).to(self.e_score_correction_bias.dtype)

    def _route(self, logits_BTE: Tensor, load_E: Tensor | None, ids_TK: Tensor | None) -> Routing:
        bias_E = self.e_score_correction_bias
        if not torch.is_grad_enabled():
            chosen_TK, weights_TK, scores_TE = route(logits_BTE.flatten(0, 1), bias_E, self._limits, load_E, ids_TK)
            return Routing(chosen_TK, weights_TK, scores_TE.view_as(logits_BTE))
        return Routing(*_Route.apply(logits_BTE, bias_E, self._limits, load_E, ids_TK))  # type: ignore[no-untyped-call]

    def _force(self, logits_BTE: Tensor, ids_TK: Tensor) -> Tensor:
        """Returns forced ids, and the router's choice where they are -1. Raises an error if they are invalid."""
        config = self._config
        logits_TE = logits_BTE.detach().flatten(0, 1)
        shape = (len(logits_TE), config.num_experts_per_token)
        if ids_TK.shape != shape or ids_TK.dtype != torch.int64:
            description = f"{ids_TK.dtype} {list(ids_TK.shape)}"
            raise RouteError(f"forced ids must be torch.int64 {list(shape)}, got {description}")
        # Sorted ids show both faults at once: the ends are outside, or neighbors are equal.
        is_free_T = (ids_TK == FREE_CHOICE).all(-1)
        ordered_TK = ids_TK.sort(-1).values
        is_outside_T = (ordered_TK[:, 0] < 0) | (ordered_TK[:, -1] >= config.num_routed_experts)
        is_repeated_T = (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any(-1)
        is_wrong_T = (is_outside_T | is_repeated_T) & ~is_free_T
        has_wrong, has_free = torch.stack((is_wrong_T.any(), is_free_T.any())).tolist()  # host sync
        if has_wrong:
            token = int(is_wrong_T.nonzero()[0])
            raise RouteError(
                f"forced ids must be different experts in 0 to {config.num_routed_experts - 1}, "
                f"token {token} has {ids_TK[token].tolist()}"
            )
        if not has_free:
            return ids_TK
        chosen_TK, _, _ = route(logits_TE, self.e_score_correction_bias, self._limits)
        return torch.where(is_free_T[:, None], chosen_TK, ids_TK)


class Routes(Protocol):
    """Chooses experts in place of routers, or records their choices (replay: arXiv:2510.11370)."""

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        """Routes one micro-batch in the layer that the label names."""


def expert_id_dtype(num_experts: int) -> torch.dtype:
    """Returns the type that stores expert ids in as few bytes as their number requires."""
    return torch.uint8 if num_experts <= 2**8 else torch.int16


@dataclass(slots=True)
class RecordedRoutes:
    """Lets routers choose, and records their choices: NK by layer, direction and micro-batch."""

    ids: dict[Label, Tensor] = field(default_factory=dict)

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        """Routes by the router's choice, and records it in as few bytes as the number of experts requires."""
        routing = router.route(logits_BTE)
        self.ids[label] = routing.ids_TK.to(expert_id_dtype(logits_BTE.shape[-1]))
        return routing


@dataclass(frozen=True, slots=True)
class ReplayedRoutes:
    """Sends tokens to given experts (-1: the router's), MTP modules after `num_layers` excepted."""

    ids: Mapping[Label, Tensor]
    num_layers: int | None = None

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        """Routes by the given choice, or raises a `RouteError` if there is no valid one for this place."""
        if self.num_layers is not None and label.layer >= self.num_layers:
            return router.route(logits_BTE)
        if label not in self.ids:
            raise RouteError(f"{label}: no experts are recorded")
        try:
            return router.route(logits_BTE, self.ids[label].to(torch.int64))
        except RouteError as error:
            raise RouteError(f"{label}: {error}") from None

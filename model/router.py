"""The gate: sigmoid scores, group-limited top-k on biased scores, weights from unbiased ones.

Source: arXiv:2412.19437, sections 2.1.2 and 4.2; arXiv:2408.15664, algorithm 1.
Shape legend: B sequences, T tokens of one sequence, N tokens in all, D hidden size, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from comm.node_limit import limit_groups
from model.config import ModelConfig
from model.precision.linear import widen

# Of a group's biased scores, how many make its score, whatever the experts per token: as in the released code.
GROUP_SCORE_EXPERTS = 2


@dataclass(frozen=True, slots=True)
class Routing:
    """ids_NK int64, weights_NK and scores_BTE (sigmoid, unbiased) in float32 or wider."""

    ids_NK: Tensor
    weights_NK: Tensor
    scores_BTE: Tensor

    @property
    def balance(self) -> Tensor:
        """Sum over sequences of sum_i f_i P_i, unscaled; f from plain top-k of unbiased scores, without gradient."""
        scores_BTE, num_experts_per_token = self.scores_BTE, self.ids_NK.shape[1]
        _, tokens, num_experts = scores_BTE.shape
        top_BTK = scores_BTE.detach().topk(num_experts_per_token, -1, sorted=False).indices
        counts_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(
            1, top_BTK.flatten(1), torch.ones_like(top_BTK.flatten(1), dtype=scores_BTE.dtype)
        )
        frequency_BE = counts_BE * (num_experts / (num_experts_per_token * tokens))
        share_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
        return (frequency_BE * share_BE).sum()


class Router(nn.Module):
    """Chooses each token's experts. The correction bias takes part in the choice only and gets no gradient."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self._config = config
        self.weight = nn.Parameter(torch.empty(config.num_routed_experts, config.hidden_size, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_routed_experts))
        self.register_buffer("load", torch.zeros(config.num_routed_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Routes every token by its normalised state."""
        return self.route(functional.linear(widen(x_BTD), widen(self.weight)))

    def route(self, logits_BTE: Tensor) -> Routing:
        """Routes every token by its logits; adds this rank's choices to `load` when gradients are recorded."""
        scores_BTE = logits_BTE.sigmoid()
        ids_NK = self._choose(scores_BTE.detach().flatten(0, 1))
        chosen_NK = scores_BTE.flatten(0, 1).gather(1, ids_NK)
        weights_NK = chosen_NK / (chosen_NK.sum(-1, keepdim=True) + 1e-20) * self._config.routed_scaling_factor
        if torch.is_grad_enabled():
            # Not bincount, which waits for the device to know how much it counts.
            self.load.scatter_add_(0, ids_NK.flatten(), torch.ones_like(ids_NK.flatten()))
        return Routing(ids_NK, weights_NK, scores_BTE)

    def update_bias(self, load_E: Tensor, rate: float) -> None:
        """Raises the bias of experts below the mean load and lowers that of those above it, by `rate`.

        Args:
            load_E: tokens that each expert received in the step, over the whole global batch.
            rate: the step of the bias (1e-3 in V3).
        """
        load = load_E.to(torch.float64)
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load).to(self.e_score_correction_bias.dtype)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        config = self._config
        biased_NE = scores_NE + self.e_score_correction_bias
        if config.num_limited_groups < config.num_expert_groups:
            kept_NE = limit_groups(
                biased_NE,
                config.num_expert_groups,
                config.num_limited_groups,
                min(GROUP_SCORE_EXPERTS, config.num_routed_experts // config.num_expert_groups),
            )
            biased_NE = biased_NE.masked_fill(~kept_NE, -torch.inf)
        return biased_NE.topk(config.num_experts_per_token, -1, sorted=False).indices

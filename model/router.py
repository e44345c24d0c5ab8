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
from model.precision import widen


@dataclass(frozen=True, slots=True)
class Routing:
    """ids_NK int64, weights_NK (float32 or wider), and the sum over sequences of the balance loss, unscaled."""

    ids_NK: Tensor
    weights_NK: Tensor
    balance: Tensor


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
        """Routes every token; adds this rank's choices to `load` when gradients are recorded."""
        scores_BTE = functional.linear(widen(x_BTD), widen(self.weight)).sigmoid()
        ids_NK = self._choose(scores_BTE.detach().flatten(0, 1))
        chosen_NK = scores_BTE.flatten(0, 1).gather(1, ids_NK)
        weights_NK = chosen_NK / (chosen_NK.sum(-1, keepdim=True) + 1e-20) * self._config.routed_scaling_factor
        if torch.is_grad_enabled():
            self.load += torch.bincount(ids_NK.flatten(), minlength=self._config.num_routed_experts)
        return Routing(ids_NK, weights_NK, self._balance(scores_BTE))

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
                config.num_experts_per_token // config.num_limited_groups,
            )
            biased_NE = biased_NE.masked_fill(~kept_NE, -torch.inf)
        return biased_NE.topk(config.num_experts_per_token, -1, sorted=False).indices

    def _balance(self, scores_BTE: Tensor) -> Tensor:
        """Sum over sequences of sum_i f_i P_i; f from plain top-k of unbiased scores, without gradient."""
        config = self._config
        top_BTK = scores_BTE.detach().topk(config.num_experts_per_token, -1, sorted=False).indices
        counts_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(
            1, top_BTK.flatten(1), torch.ones_like(top_BTK.flatten(1), dtype=scores_BTE.dtype)
        )
        tokens = scores_BTE.shape[1]
        frequency_BE = counts_BE * (config.num_routed_experts / (config.num_experts_per_token * tokens))
        share_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
        return (frequency_BE * share_BE).sum()

"""Passes of a whole model over its latent cache: prompts read once, then a few new tokens of every sequence at a time.

Shape legend: B sequences held, S new tokens of each, N new tokens of all, D hidden size, V vocabulary,
C values per token in the cache, T positions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from model.attention.kv_cache import CacheView, KvCache, PromptView, StepView
from model.attention.rope import Rotation, rotation_table
from model.block import Block
from model.mlp import Mlp
from model.precision.linear import widen
from model.transformer import Transformer

Views = Callable[[int], CacheView]
"""What each layer of a cache gives to one pass."""


class Decoder:
    """A model with the caches of the sequences that it goes on with; in the weights' type, of a model in FP8 as well.

    The main model and the MTP module keep a cache each, whose rows are the same sequences: the MTP module's token i
    is the pair of the main model's state of token i and the embedding of token i + 1. Tokens do not count until
    `KvCache.resize` says so: that is the caller's, who knows which of them stay.
    """

    def __init__(self, model: Transformer, max_sequences: int, capacity: int, *, with_mtp: bool) -> None:
        """Room for `max_sequences` of `capacity` tokens each, in the model's type and on its device."""
        config, weight = model.config, model.head_weight
        self._model, self._config = model, config
        width = model.attention.values_per_token(config)
        self.main = KvCache(width, config.num_layers, max_sequences, capacity, weight.dtype, weight.device)
        self.mtp = KvCache(width, int(with_mtp), max_sequences, capacity, weight.dtype, weight.device)
        cos, sin = rotation_table(config, capacity, torch.promote_types(weight.dtype, torch.float32))
        self._cos_TP, self._sin_TP = cos.to(weight.device), sin.to(weight.device)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self._cos_TP.device

    def add(self) -> int:
        """Takes in an empty sequence; its row in both caches."""
        self.mtp.add()
        return self.main.add()

    def remove(self, row: int) -> None:
        """Forgets a sequence; the last row moves into its place."""
        self.mtp.remove(row)
        self.main.remove(row)

    def read_prompts(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Fills empty rows with whole prompts.

        Returns:
            The state of every prompt token as the MTP module reads it, ND, prompt by prompt, and the logits after the
            last token of each prompt, BV.
        """
        counts = [len(prompt) for prompt in prompts]
        tokens_N = self._tensor([token for prompt in prompts for token in prompt])
        views = self._over_prompts(self.main, rows, counts)
        state_ND, normal_ND = self._run_main(tokens_N, views)
        last_B = self._tensor(counts).cumsum(0) - 1
        return state_ND, self.logits(normal_ND[last_B])

    def step(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The main model over S new tokens of every sequence held, from its length on.

        Returns:
            Their states as the MTP module reads them, BSD, and their logits, BSV.
        """
        views = self._over_cache(self.main, tokens_BS.shape[1])
        state_ND, normal_ND = self._run_main(tokens_BS.flatten(), views)
        return state_ND.view(*tokens_BS.shape, -1), self.logits(normal_ND).view(*tokens_BS.shape, -1)

    def read_prompts_mtp(self, rows: Sequence[int], next_tokens: Sequence[Sequence[int]], state_ND: Tensor) -> None:
        """Fills the MTP module's empty rows.

        Args:
            rows: of the sequences.
            next_tokens: of each sequence, the token after each state; at least one.
            state_ND: what `read_prompts` gave for the same positions, sequence by sequence.
        """
        counts = [len(tokens) for tokens in next_tokens]
        tokens_N = self._tensor([token for tokens in next_tokens for token in tokens])
        self._run_mtp(tokens_N, state_ND, self._over_prompts(self.mtp, rows, counts))

    def step_mtp(self, next_tokens_BS: Tensor, state_BSD: Tensor, chosen_B: Tensor) -> Tensor:
        """The MTP module over S new pairs of every sequence held.

        Args:
            next_tokens_BS: the token after each state.
            state_BSD: states from `read_prompts` or `step`.
            chosen_B: which of the S pairs of each sequence the logits are wanted for.

        Returns:
            Logits of the token after `next_tokens_BS` at the chosen pairs, BV.
        """
        views = self._over_cache(self.mtp, next_tokens_BS.shape[1])
        hidden_ND = self._run_mtp(next_tokens_BS.flatten(), state_BSD.flatten(0, 1), views)
        chosen_N = torch.arange(len(chosen_B), device=chosen_B.device) * next_tokens_BS.shape[1] + chosen_B
        return self.logits(self._model.final_norm(1)(hidden_ND[chosen_N]))

    def logits(self, normal_ND: Tensor) -> Tensor:
        """Of the shared output head, float32 or wider: NV."""
        return widen(functional.linear(normal_ND, self._model.head_weight))

    def _run_main(self, tokens_N: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """States for the MTP module and states for the head."""
        hidden_ND = self._model.embed(tokens_N[None], None)[0]
        for layer in range(self._config.num_layers):
            hidden_ND = self._run(self._model.block(layer), hidden_ND, views(layer))
        normal_ND = self._model.final_norm(0)(hidden_ND)
        return (normal_ND if self._config.mtp_hidden == "post_norm" else hidden_ND), normal_ND

    def _run_mtp(self, next_tokens_N: Tensor, state_ND: Tensor, views: Views) -> Tensor:
        block = self._model.mtp_block(1)
        embedded_1ND = self._model.embed(next_tokens_N[None], None)
        return self._run(block, block.merge(embedded_1ND, state_ND[None], None)[0], views(0))

    def _run(self, block: Block, hidden_ND: Tensor, view: CacheView) -> Tensor:
        residual_ND = hidden_ND + block.self_attn.decode(block.input_layernorm(hidden_ND), view)
        rows_ND: Tensor = block.post_attention_layernorm(residual_ND)
        if isinstance(block.mlp, Mlp):
            dense: Tensor = residual_ND + block.mlp(rows_ND, None)
            return dense
        dispatcher, moe = self._model.dispatcher, block.mlp
        routing = moe.gate(rows_ND[None])
        handle = dispatcher.plan(routing.ids_NK, routing.weights_NK)
        arrived = dispatcher.dispatch(rows_ND, routing.weights_NK, handle).wait()
        routed_AD = moe.experts.apply_in_weight_type(arrived.rows_AD, arrived.weights_A, arrived.counts)
        if moe.shared_experts is not None:
            residual_ND = residual_ND + moe.shared_experts(rows_ND, None)
        return residual_ND + dispatcher.combine(routed_AD, handle).wait()

    def _over_prompts(self, cache: KvCache, rows: Sequence[int], counts: Sequence[int]) -> Views:
        """Attention within prompts from position 0, by cache layer."""
        rotation = self._rotation(torch.cat([torch.arange(count) for count in counts]).to(self.device))
        return lambda layer: PromptView(cache, layer, rows, counts, rotation)

    def _over_cache(self, cache: KvCache, num_new: int) -> Views:
        """Attention of `num_new` tokens of every sequence over what is cached, by cache layer."""
        longest = max(cache.lengths)
        num_positions = longest + num_new
        positions_BS = self._tensor(cache.lengths)[:, None] + torch.arange(num_new, device=self.device)
        rotation = self._rotation(positions_BS.flatten())
        future_BST = None
        if num_new > 1 or min(cache.lengths) < longest:
            future_BST = torch.arange(num_positions, device=self.device) > positions_BS[..., None]
        return lambda layer: StepView(cache, layer, positions_BS, num_positions, future_BST, rotation)

    def _rotation(self, positions_N: Tensor) -> Rotation:
        return Rotation(self._cos_TP[positions_N], self._sin_TP[positions_N])

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.device)

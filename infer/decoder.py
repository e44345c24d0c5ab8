"""Runs a model, or a part of it, with a latent KV cache: over prompts, then over a few new tokens.

A route recorder keeps which experts the router chose for the tokens that a decoder reads.

Shape legend: B cached sequences, S new tokens of each, N new tokens of all, D hidden size, V vocabulary,
C values per token in the cache, T positions, P values of a rotation, A received rows (one for each token and expert),
L layers, K experts per token.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comm.protocol import RankLocalDispatcher, Work
from infer.protocol import PROMPT_SAMPLE, NumberedPrompt, RouteKey, Sample, SampledRoutes
from kernels.few_rows import MOST_CHOICES, few_rows_linear, has_few_rows_forms
from model.attention.cache import CacheView, KvCache, PromptView, StepView
from model.attention.form import rotation_table
from model.block import Attended, Block, Mlp, Moe
from model.config import BLOCK_TOKENS, ModelConfig
from model.linear import widen
from model.phases import CombinePhase, DispatchPhase, Exchange
from model.router import expert_id_dtype
from model.transformer import Transformer
from model.values import ExpertOutput, Routed


class RouteStore:
    """Records of the sequences of one direction on this rank."""

    def __init__(self, prompts: Sequence[NumberedPrompt], samples: int) -> None:
        self._prompts = prompts
        self._samples = samples
        self._ids: dict[RouteKey, NDArray[np.generic]] = {}

    def add(self, place: int, layers: Sequence[int], ids_LTK: Tensor) -> None:
        """Adds the record of a sequence that is complete. A part of a prompt is ignored."""
        prompt = self._prompts[place // self._samples]
        sample = place % self._samples
        length = len(prompt.tokens)
        if ids_LTK.shape[1] < length:
            return
        host_LTK = ids_LTK.cpu().numpy()  # host sync
        for layer, ids_TK in zip(layers, host_LTK, strict=True):
            prompt_key = RouteKey(prompt.number, PROMPT_SAMPLE, layer)
            if prompt_key not in self._ids:
                self._ids[prompt_key] = ids_TK[:length].copy()
            self._ids[RouteKey(prompt.number, sample, layer)] = ids_TK[length:].copy()

    def cut(self, rollouts: Mapping[tuple[int, int], Sample]) -> dict[RouteKey, NDArray[np.generic]]:
        """Returns the records without tokens that are no part of the rollouts, by prompt and sample."""
        cut = {}
        for key, ids_TK in self._ids.items():
            num_read = len(ids_TK) if key.sample == PROMPT_SAMPLE else len(rollouts[key[:2]].tokens) - 1
            # A rejected or unused draft may follow. A view would hold its bytes.
            kept_TK = ids_TK if len(ids_TK) == num_read else ids_TK[:num_read].copy()
            if len(kept_TK):
                cut[key] = kept_TK
        return cut


class RouteRecorder:
    """Records the experts of the tokens in the rows of a decoder's main cache; none without a store."""

    def __init__(self, config: ModelConfig, layers: Sequence[int], cache: KvCache, store: RouteStore | None) -> None:
        self._layers = tuple(layer for layer in layers if store is not None and layer >= config.num_dense_layers)
        self._store = store
        self._dtype = expert_id_dtype(config.num_routed_experts)
        self._cache = cache
        self._ids = cache.attach(config.num_experts_per_token, len(self._layers), self._dtype)
        self.places: list[int] = []  # of the sequences, by row
        # Tokens of each row after the pass, drafts included. Used only in a stage that does not choose tokens.
        self._read: list[int] = []

    def write(self, layer: int, view: CacheView, ids_NK: Tensor) -> None:
        """Writes the experts of new tokens. A layer that is not the main model's is ignored."""
        if layer in self._layers:
            self._ids.write(self._layers.index(layer), view.slots_N, ids_NK.to(self._dtype))

    def add(self, place: int) -> None:
        """Adds an empty row for the sequence of a place."""
        self.places.append(place)

    def remove(self, row: int) -> None:
        """Stores the sequence of a row, which leaves the cache then, and moves the last row into its place."""
        self._keep(row, self._cache.lengths[row])
        last = self.places.pop()
        if row < len(self.places):
            self.places[row] = last

    def swap(self, row: int, other: int) -> None:
        """Exchanges the sequences of two rows."""
        self.places[row], self.places[other] = self.places[other], self.places[row]

    def arrange(self, lengths: Sequence[int], counts: Sequence[int], places: Sequence[int]) -> None:
        """Stores the sequences that leave the cache before a pass, and takes over the others' rows."""
        staying = set(places)
        for row, (sequence, num_read) in enumerate(zip(self.places, self._read, strict=True)):
            if sequence not in staying:
                self._keep(row, num_read)
        self.places = list(places)
        self._read = [length + count for length, count in zip(lengths, counts, strict=True)]

    def finish(self) -> None:
        """Stores the sequences of all rows after the last pass."""
        self.arrange((), (), ())

    def _keep(self, row: int, length: int) -> None:
        if self._store is None or not self._layers or not length:
            return
        blocks = self._cache.blocks(range(row, row + 1), length)
        ids = [self._ids.read(layer, blocks)[0] for layer in range(len(self._layers))]
        self._store.add(self.places[row], self._layers, torch.stack(ids))


def join_routes(stores: Iterable[RouteStore], rollouts: Iterable[Sample]) -> SampledRoutes:
    """Returns the records of several stores, given the rollouts of all of their sequences."""
    samples = {(rollout.prompt, rollout.sample): rollout for rollout in rollouts}
    return SampledRoutes(ids={key: ids_TK for store in stores for key, ids_TK in store.cut(samples).items()})


Views = Callable[[int], CacheView]  # maps a layer's index within its cache to its view of the cache in one pass

PassKind = Literal["parts", "step"]
"""New tokens of a pass: parts of prompts, the first ones of empty rows or a later one of one row, or a step."""


Passage = Generator[Callable[[], Work[Any]], Any, Tensor]
"""Layers as phases: yields a function that starts each exchange, and takes its result."""


def run_passage(passage: Passage) -> Tensor:
    """Runs the phases of a passage one after the other, and returns its result."""
    try:
        start = next(passage)
        while True:
            start = passage.send(start().wait())
    except StopIteration as end:
        result: Tensor = end.value
        return result


class PartDecoder:
    """Cached passes of a part of a model: embedding, some layers, final norm and head, MTP module.

    Each needs only its own weights, so the part may be a pipeline stage. The layers and the MTP module have one cache
    each, with the same sequences in the same rows. Entry i of the MTP module's cache is for the pair of the main
    model's state of token i and the embedding of token i + 1. New entries do not count until the caller sets the length
    with `KvCache.resize`, because only the caller knows which tokens stay.
    """

    def __init__(
        self,
        model: Transformer,
        max_sequences: int,
        capacity: int,
        *,
        with_mtp: bool,
        layers: Sequence[int] | None = None,
        routes: RouteStore | None = None,
        num_blocks: int | None = None,
    ) -> None:
        """Allocates the caches for the layers that run here, by default all.

        Args:
            num_blocks: blocks of each cache; None for as many as all sequences need at most, each in its own lane.
        """
        config = model.config
        weight = next(model.parameters())
        self._model = model
        self._config = config
        self._dtype = weight.dtype
        self._layers = tuple(range(config.num_layers) if layers is None else layers)
        # Few tokens need no exchange if all experts are here and decode in the weights' own type.
        has_experts = isinstance(model.dispatcher, RankLocalDispatcher) and not model.decodes_as_trained
        is_few = has_experts and has_few_rows_forms(weight)
        self._most_few = MOST_CHOICES // config.num_experts_per_token if is_few else 0
        width = config.cached_values
        lane = 1 if num_blocks is not None else -(-capacity // BLOCK_TOKENS)
        sizes = (num_blocks or max_sequences * lane, weight.dtype, weight.device)
        self.main = KvCache(width, len(self._layers), *sizes, lane=lane)
        self.mtp = KvCache(width, int(with_mtp), *sizes, lane=lane)
        table = rotation_table(config, capacity, torch.promote_types(weight.dtype, torch.float32))
        self._turns_TP = torch.complex(*table).to(weight.device)
        self.recorder = RouteRecorder(config, self._layers, self.main, routes)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._turns_TP.device

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that both caches have free."""
        return min(self.main.num_free_blocks, self.mtp.num_free_blocks)

    def add(self, place: int = 0) -> int:
        """Adds an empty sequence. Returns its row, which is the same in both caches."""
        self.mtp.add()
        self.recorder.add(place)
        return self.main.add()

    def remove(self, row: int) -> None:
        """Removes a sequence and moves the last row into its place."""
        self.recorder.remove(row)
        self.mtp.remove(row)
        self.main.remove(row)

    def swap(self, row: int, other: int) -> None:
        """Exchanges two sequences."""
        self.recorder.swap(row, other)
        self.mtp.swap(row, other)
        self.main.swap(row, other)

    def copy_prompt(self, source: int, target: int, num_tokens: int, num_pairs: int) -> None:
        """Copies the first tokens of a sequence, and its first pairs, to an empty row of both caches."""
        self.main.copy_start(source, target, num_tokens)
        self.mtp.copy_start(source, target, num_pairs)

    def arrange(
        self, sources: Sequence[int], lengths: Sequence[int], counts: Sequence[int], places: Sequence[int]
    ) -> None:
        """Replaces the sequences before a pass: a source is the row that held the tokens, or -1 if it is new."""
        self.recorder.arrange(lengths, counts, places)
        self.main.arrange(sources, lengths)

    def embed(self, tokens_N: Tensor) -> Tensor:
        """Returns the embeddings of tokens, ND."""
        return self._model.embed(tokens_N[None], None)[0]

    def run_layers(self, hidden_ND: Tensor, views: Views) -> Tensor:
        """Runs the layers of this part; returns the last one's output, ND."""
        return run_passage(self.passage(hidden_ND, views))

    def run_idle_layers(self) -> None:
        """Runs the experts of the layers for other ranks, without any token of this rank."""
        run_passage(self.idle_passage())

    def run_idle_mtp(self) -> None:
        """Runs the experts of the MTP module for other ranks, without any token of this rank."""
        run_passage(self._block(self._model.mtp_block(1), self._no_rows(), None))

    def passage(self, hidden_ND: Tensor, views: Views | None) -> Passage:
        """Runs the layers of this part as phases; returns the last one's output, ND."""
        for index, layer in enumerate(self._layers):
            view = None if views is None else views(index)
            hidden_ND = yield from self._block(self._model.block(layer), hidden_ND, view, layer)
        return hidden_ND

    def idle_passage(self) -> Passage:
        """Runs the experts of the layers for other ranks as phases, without any token of this rank."""
        return self.passage(self._no_rows(), None)

    @property
    def num_exchanges(self) -> int:
        """Exchanges of a passage: dispatch and combine of each MoE layer."""
        return 2 * sum(self._model.block(layer).moe is not None for layer in self._layers)

    def final_norm(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the states for the MTP module and the states for the head, both ND, after the last layer."""
        normal_ND = self._model.final_norm(0).decode(hidden_ND)
        return (normal_ND if self._config.mtp_hidden == "post_norm" else hidden_ND), normal_ND

    def logits(self, normal_ND: Tensor) -> Tensor:
        """Returns the logits of the shared output head, NV, in float32 or wider."""
        return widen(few_rows_linear(normal_ND, self._model.head_weight))

    def read_mtp(self, rows: Sequence[int], next_tokens: Sequence[Sequence[int]], state_ND: Tensor) -> None:
        """Runs the MTP module over the first pairs of some prompts, or over later ones of one."""
        counts = [len(tokens) for tokens in next_tokens]
        tokens_N = self._tensor([token for tokens in next_tokens for token in tokens])
        self._run_mtp(tokens_N, state_ND, self._over_parts(self.mtp, rows, counts))

    def step_mtp(self, next_tokens_BS: Tensor, state_BSD: Tensor, chosen_B: Tensor) -> Tensor:
        """Runs the MTP module over S new pairs of the sequences of the first B rows.

        Returns the logits, BV, of the token after the chosen pair in 0..S-1 of each sequence.
        """
        views = self._over_rows(self.mtp, range(len(chosen_B)), next_tokens_BS.shape[1])
        hidden_ND = self._run_mtp(next_tokens_BS.flatten(), state_BSD.flatten(0, 1), views)
        chosen_N = torch.arange(len(chosen_B), device=chosen_B.device) * next_tokens_BS.shape[1] + chosen_B
        return self.logits(self._model.final_norm(1).decode(hidden_ND[chosen_N]))

    def views(self, kind: PassKind, rows: Sequence[int], counts: Sequence[int]) -> Views:
        """Returns the views of the layers of this part in a pass."""
        if kind == "step":
            return self._over_rows(self.main, range(rows[0], rows[0] + len(rows)), counts[0])
        return self._over_parts(self.main, rows, counts)

    def _over_parts(self, cache: KvCache, rows: Sequence[int], counts: Sequence[int]) -> Views:
        """Returns the views of attention of the next parts of prompts: within them, or over one row's cache."""
        if cache.lengths[rows[0]]:
            return self._over_rows(cache, range(rows[0], rows[0] + 1), counts[0])
        # Prompts start at position 0.
        turns_NP = self._turns_TP[torch.cat([torch.arange(count) for count in counts]).to(self.device)]
        slots_N = cache.slots(rows, counts)
        return lambda layer: PromptView(cache.values, layer, counts, slots_N, turns_NP)

    def _over_rows(self, cache: KvCache, rows: range, num_new: int) -> Views:
        """Returns the views of attention of `num_new` tokens of each row over its cached tokens."""
        lengths = cache.lengths[rows.start : rows.stop]
        longest = max(lengths)
        num_positions = longest + num_new
        # New tokens follow the cached ones: position = length of the sequence + number of the new token.
        positions_BS = self._tensor(lengths)[:, None] + torch.arange(num_new, device=self.device)
        turns_NP = self._turns_TP[positions_BS.flatten()]
        # A mask is needed if there are several new tokens, or if sequences differ in length.
        future_BST = None
        if num_new > 1 or min(lengths) < longest:
            future_BST = torch.arange(num_positions, device=self.device) > positions_BS[..., None]
        slots_N = cache.slots(rows, [num_new] * len(rows))
        blocks = cache.blocks(rows, num_positions)
        return lambda layer: StepView(cache.values, layer, slots_N, blocks, positions_BS, future_BST, turns_NP)

    def _run_mtp(self, next_tokens_N: Tensor, state_ND: Tensor, views: Views) -> Tensor:
        block = self._model.mtp_block(1)
        merged_1ND = block.merge(self.embed(next_tokens_N)[None], state_ND[None], None)
        return run_passage(self._block(block, merged_1ND[0], views(0)))

    def _block(self, block: Block, hidden_ND: Tensor, view: CacheView | None, layer: int | None = None) -> Passage:
        """Runs one block over N tokens; returns ND. The experts of a numbered layer may be recorded.

        Without a view there are no tokens: the block takes part in the exchanges of others.
        """
        if view is None:
            if isinstance(block.mlp, Moe):
                yield from self._experts(block, block.mlp, block.route(hidden_ND[None]))
            return hidden_ND
        residual_ND = block.self_attn.decode(hidden_ND, block.input_layernorm, view)
        if isinstance(block.mlp, Mlp):
            return block.mlp.decode(residual_ND, block.post_attention_layernorm)
        if 0 < len(residual_ND) <= self._most_few:
            out_ND, routing = block.decode_few(residual_ND)
            if layer is not None:
                self.recorder.write(layer, view, routing.ids_TK)
            return out_ND
        attended = block.route(residual_ND[None])
        if layer is not None:
            self.recorder.write(layer, view, attended.routing.ids_TK)
        return (yield from self._experts(block, block.mlp, attended))

    def _experts(self, block: Block, moe: Moe, attended: Attended) -> Passage:
        """Dispatches rows to the routed experts, adds the shared experts, and combines; ND."""
        exchange = Exchange(self._model.dispatcher, None, block.wire(), moe.experts.open_copies)
        routing = moe.choose_slots(attended.routing)
        base_1ND = attended.residual_BTD
        routed = Routed(base_1ND, attended.rows, routing.weights_TK, routing.ids_TK)
        received = yield partial(DispatchPhase(exchange).forward, routed)
        routed_AD = moe.experts.of_received(received, None)
        if moe.shared_experts is not None:
            base_1ND = moe.shared_experts.decode(base_1ND, block.post_attention_layernorm, attended.rows)
        combined = yield partial(CombinePhase(exchange).forward, ExpertOutput(routed_AD, base_1ND))
        hidden_1ND: Tensor = combined.hidden_BTD
        return hidden_1ND[0]

    def _no_rows(self) -> Tensor:
        return torch.empty(0, self._config.hidden_size, dtype=self._dtype, device=self.device)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.device)


class Decoder(PartDecoder):
    """A whole model with KV caches. A subclass may hold only the last layers, if it overrides `_enter`."""

    def read(self, rows: Sequence[int], parts: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Runs the main model over the first parts of some prompts, or over a later one of one.

        Returns the states of each part's tokens for the MTP module and for the head, both TD.
        """
        counts = [len(part) for part in parts]
        tokens_N = self._tensor([token for part in parts for token in part])
        state_ND, normal_ND = self._run_main("parts", tokens_N, rows, counts)
        return list(zip(state_ND.split(counts), normal_ND.split(counts), strict=True))

    def step(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Runs S new tokens of the first B rows; returns states for the MTP module, BSD, and logits, BSV."""
        num_rows, num_new = tokens_BS.shape
        state_ND, normal_ND = self._run_main("step", tokens_BS.flatten(), range(num_rows), [num_new] * num_rows)
        return state_ND.view(num_rows, num_new, -1), self.logits(normal_ND).view(num_rows, num_new, -1)

    def _run_main(
        self, kind: PassKind, tokens_N: Tensor, rows: Sequence[int], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Runs a pass of the main model. Returns what `final_norm` does."""
        hidden_ND = self._enter(kind, tokens_N, rows, counts)
        return self.final_norm(self.run_layers(hidden_ND, self.views(kind, rows, counts)))

    def _enter(self, kind: PassKind, tokens_N: Tensor, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Returns the input of the first layer that runs here, ND."""
        return self.embed(tokens_N)

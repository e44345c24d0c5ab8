"""Records which experts the router chose for the tokens that a decoder reads.

Shape legend: L layers, T tokens, N new tokens of all rows, K experts per token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infer.protocol import PROMPT_SAMPLE, NumberedPrompt, RouteKey, Sample, SampledRoutes
from model.attention.form import CacheView, KvCache
from model.config import ModelConfig
from model.router import expert_id_dtype


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
            whole = RouteKey(prompt.number, PROMPT_SAMPLE, layer)
            if whole not in self._ids:
                self._ids[whole] = ids_TK[:length].copy()
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

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[int],
        max_sequences: int,
        capacity: int,
        device: torch.device,
        store: RouteStore | None,
    ) -> None:
        self._layers = tuple(layer for layer in layers if store is not None and layer >= config.num_dense_layers)
        self._store = store
        self._dtype = expert_id_dtype(config.num_routed_experts)
        num_choices = config.num_experts_per_token
        self._rows = KvCache(num_choices, len(self._layers), max_sequences, capacity, self._dtype, device)
        self._places: list[int] = []
        # Tokens of each row after the pass, drafts included. Used only in a stage that does not choose tokens.
        self._read: list[int] = []

    def write(self, layer: int, view: CacheView, ids_NK: Tensor) -> None:
        """Writes the experts of new tokens. A layer that is not the main model's is ignored."""
        if layer in self._layers:
            at = self._layers.index(layer)
            replace(view, cache=self._rows, layer=at).write(ids_NK.to(self._dtype))

    def add(self, place: int) -> None:
        """Adds an empty row for the sequence of a place."""
        self._rows.add()
        self._places.append(place)

    def remove(self, row: int, lengths: Sequence[int]) -> None:
        """Stores the sequence of a row and moves the last row into its place."""
        self._keep(row, lengths[row])
        self._rows.resize(len(lengths) - 1, lengths[-1])
        self._rows.remove(row)
        last = self._places.pop()
        if row < len(self._places):
            self._places[row] = last

    def copy_start(self, source: int, target: int, length: int) -> None:
        """Copies the first tokens of a row to another one."""
        self._rows.copy_start(source, target, length)

    def arrange(
        self, sources: Sequence[int], lengths: Sequence[int], counts: Sequence[int], places: Sequence[int]
    ) -> None:
        """Replaces the sequences before a pass, as `PartDecoder.arrange` does, and stores those that leave."""
        staying = set(places)
        for row, (place, num_read) in enumerate(zip(self._places, self._read, strict=True)):
            if place not in staying:
                self._keep(row, num_read)
        self._rows.arrange(sources, lengths)
        self._places = list(places)
        self._read = [length + count for length, count in zip(lengths, counts, strict=True)]

    def finish(self) -> None:
        """Stores the sequences of all rows after the last pass."""
        self.arrange((), (), (), ())

    def _keep(self, row: int, length: int) -> None:
        ids = [self._rows.read(layer, slice(row, row + 1), length)[0] for layer in range(len(self._layers))]
        if self._store is not None and ids:
            self._store.add(self._places[row], self._layers, torch.stack(ids))


def join_routes(stores: Iterable[RouteStore], rollouts: Iterable[Sample]) -> SampledRoutes:
    """Returns the records of several stores, given the rollouts of all of their sequences."""
    found = {(each.prompt, each.sample): each for each in rollouts}
    return SampledRoutes(ids={key: ids_TK for store in stores for key, ids_TK in store.cut(found).items()})

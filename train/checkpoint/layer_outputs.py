"""Compares what each layer of two checkpoints computes, with one layer in memory at a time.

Shape legend: B one sequence, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from model.block import run_block
from model.config import ModelConfig
from model.transformer import Part, Transformer, named_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputReport:
    """How much outputs differ, relative to the expected ones.

    Attributes:
        parts: of each part by name, for the same input: the expected states before it.
        logits: of the whole network.
        same_choices: share of tokens after which the same token has the largest logit.
    """

    parts: dict[str, float]
    logits: float
    same_choices: float


class LayerSource:
    """Builds one part of a checkpoint's network at a time, in a type, from a function that reads a tensor."""

    def __init__(self, config: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        self.config = config
        self._read = read
        self._dtype = dtype
        self._dispatcher = LocalDispatcher(config.num_routed_experts)
        self.ends = self.load(ends=True)

    def load(self, *layers: int, ends: bool = False) -> Transformer:
        """Returns the network with some layers alone, or with embedding, final norm and head alone."""
        part = Part(layers=layers, experts=range(self.config.num_routed_experts), embedding=ends, head=ends)
        model = Transformer(self.config, self._dispatcher, self._dtype, part)
        for name, target in named_tensors(model).items():
            target.copy_(self._read(name))
        return model

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits after the last layer's output, BTV."""
        normal_BTD: Tensor = self.ends.final_norm(0)(hidden_BTD)
        return normal_BTD.float() @ self.ends.head_weight.float().T

    def run(self, layer: int, *states_BTD: Tensor) -> list[Tensor]:
        """Returns the layer's output of each state, BTD."""
        block = self.load(layer).block(layer)
        return [run_block(block, self._dispatcher, state_BTD, None)[0] for state_BTD in states_BTD]

    def run_mtp(self, depth: int, state_BTD: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Returns an MTP module's output from the state of the depth before, and its norm, BTD."""
        module = self.load(self.config.num_layers + depth - 1).mtp_block(depth)
        embedded_BTD = self.ends.embed(tokens_BT[:, depth:], None)
        merged_BTD = module.merge(embedded_BTD, state_BTD[:, :-1], None)
        out_BTD, _ = run_block(module, self._dispatcher, merged_BTD, None)
        return out_BTD, module.shared_head.norm(out_BTD)


@torch.no_grad()
def compare_outputs(ours: LayerSource, theirs: LayerSource, ids: Sequence[int]) -> OutputReport:
    """Runs both networks on the token ids, layer by layer."""
    tokens_BT = torch.tensor([ids])
    our_BTD, their_BTD = (side.ends.embed(tokens_BT, None) for side in (ours, theirs))
    parts = {"embedding": _deviation(our_BTD, their_BTD)}
    for layer in range(theirs.config.num_layers):
        # Once from our own states, for the logits, and once from the expected ones, for this layer alone.
        our_BTD, alone_BTD = ours.run(layer, our_BTD, their_BTD)
        (next_BTD,) = theirs.run(layer, their_BTD)
        parts[f"layer {layer}"] = _deviation(alone_BTD, next_BTD, their_BTD)
        their_BTD = next_BTD
    our_logits_BTV, logits_BTV = ours.logits(our_BTD), theirs.logits(their_BTD)
    parts["final norm and head"] = _deviation(ours.logits(their_BTD), logits_BTV)
    reads_norm = theirs.config.mtp_hidden == "post_norm"
    state_BTD = theirs.ends.final_norm(0)(their_BTD) if reads_norm else their_BTD
    for depth in range(1, min(ours.config.mtp_depth, theirs.config.mtp_depth) + 1):
        out_BTD, normal_BTD = theirs.run_mtp(depth, state_BTD, tokens_BT)
        parts[f"MTP module {depth}"] = _deviation(ours.run_mtp(depth, state_BTD, tokens_BT)[1], normal_BTD)
        state_BTD = normal_BTD if reads_norm else out_BTD
    return OutputReport(
        parts=parts,
        logits=_deviation(our_logits_BTV, logits_BTV),
        same_choices=float((our_logits_BTV.argmax(-1) == logits_BTV.argmax(-1)).float().mean()),
    )


def _deviation(ours: Tensor, expected: Tensor, before: Tensor | None = None) -> float:
    """Returns the difference relative to the expected change of the state, or to the output."""
    change = expected if before is None else expected - before
    return float((ours - expected).float().norm() / change.float().norm().clamp_min(1e-30))

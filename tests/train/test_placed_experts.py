"""Tests of experts that are placed on ranks with copies: no logit changes, before and after they are placed again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from infer.decoder import Decoder
from infer.expert_moves import expert_loads
from infer.placement import Placement, PlacementError, PlacementShape
from model.transformer import Transformer, initialize_weights
from tests.ranks import run_ranks
from tests.refusals import assert_refused
from tests.tiny import MODEL
from tests.train.test_decoding import Layout, config_of, foresee, opened

PROMPTS = [[5, 9, 2, 77, 31], [8], [1, 2, 3, 4, 5, 6, 7, 8], [300, 11]]
SHAPE = PlacementShape(num_experts=8, num_groups=4, num_ranks=4, num_nodes=1, num_redundant=4, policy="global")
LOADS = np.array([90.0, 1, 1, 2, 50, 3, 2, 1])
# Layer 3 and the MTP module, layer 4, have the default.
PLACEMENT = Placement(shape=SHAPE, layers={}).rebalanced({1: LOADS, 2: LOADS[::-1].copy()})


def logits(model: Transformer, prompt: list[int]) -> Tensor:
    """Returns the logits after a prompt and after three more tokens, with those of the MTP module."""
    with torch.no_grad():
        decoder = Decoder(model, 1, 32, with_mtp=True)
        decoder.add()
        [(state_TD, normal_TD)] = decoder.read([0], [prompt])
        decoder.main.resize(0, len(prompt))
        rows = [decoder.logits(normal_TD[-1:])[0]]
        state_1SD = state_TD[-1:][None]
        for token in (7, 12, 200):
            chosen_B = torch.tensor([0])
            rows.append(decoder.step_mtp(torch.tensor([[token]]), state_1SD, chosen_B)[0])
            decoder.mtp.resize(0, decoder.mtp.lengths[0] + 1)
            state_1SD, step_BSV = decoder.step(torch.tensor([[token]]))
            decoder.main.resize(0, decoder.main.lengths[0] + 1)
            rows.append(step_BSV[0, 0])
    return torch.stack(rows)


def serve(rank: int, world_size: int, folder: Path) -> list[tuple[Tensor, dict[int, Tensor], list[int]]]:
    """Returns a rank's logits, loads and experts of layer 1 in order, as placed, and as placed again."""
    seen = []
    with opened(config_of(Layout(kind="1f1b", data=world_size, expert=world_size), folder)) as (_, pipeline):
        model = pipeline.model
        for placement in (None, PLACEMENT, PLACEMENT.rebalanced({1: LOADS[::-1].copy(), 3: LOADS})):
            if placement is not None:
                pipeline.place_experts(placement)
            made = logits(model, PROMPTS[rank])
            moe = model.block(1).moe
            assert moe is not None
            seen.append((made, expert_loads(model), list(moe.experts.experts)))
    return seen


def test_placed_experts_change_no_logit(tmp_path: Path) -> None:
    model = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float64)
    initialize_weights(model, 7)
    foresee(model)
    ranks = run_ranks(4, serve, tmp_path)
    for rank, seen in enumerate(ranks):
        expected = logits(model, PROMPTS[rank])
        for made, _, _ in seen:
            torch.testing.assert_close(made, expected, atol=1e-10, rtol=0)
        # Choices are counted by expert: 4 of each token of the prompt and of 3 later ones.
        _, loads, _ = seen[1]
        assert [int(loads[layer].sum()) for layer in (1, 2, 3)] == [4 * (len(PROMPTS[rank]) + 3)] * 3
        assert int(loads[4].sum()) == 4 * 3
    for number, layer_slots in ((1, PLACEMENT.slots(1)), (2, PLACEMENT.rebalanced({1: LOADS[::-1].copy()}).slots(1))):
        assert [seen[number][2] for seen in ranks] == layer_slots.tolist()


FEW = replace(MODEL, num_routed_experts=4, num_expert_groups=2, num_experts_per_token=2)


def copies(num_experts: int, num_ranks: int, num_redundant: int) -> Placement:
    """Returns a placement of experts, shared ones last, with copies of those with the most tokens."""
    sizes = {"num_experts": num_experts, "num_ranks": num_ranks, "num_redundant": num_redundant}
    placement = Placement(shape=PlacementShape(**sizes, num_groups=1, num_nodes=1, policy="global"), layers={})
    load_E = np.array([*range(1, num_experts), 30.0])
    return placement.rebalanced({1: load_E, 3: load_E})


UNITS = {
    # As EP144: several experts a rank and copies of some, without and with the shared ones.
    "3": (replace(MODEL, num_shared_experts=2), [Placement.in_order(8, 3), copies(10, 3, 2)]),
    # As EP320: one expert a rank; the other ranks have copies, or the shared one.
    "5": (FEW, [Placement.in_order(4, 5), copies(5, 5, 0)]),
}
"""Models and placements on ranks that do not divide the experts, by their number."""


def serve_unit(rank: int, world_size: int, folder: Path, name: str) -> list[tuple[Tensor, list[int]]]:
    """Returns a rank's logits and its experts of layer 1 with each placement of a unit."""
    model, placements = UNITS[name]
    config = replace(config_of(Layout(kind="1f1b", data=world_size, expert=world_size), folder), model=model)
    seen = []
    for placement in placements:
        with opened(config) as (_, pipeline):
            pipeline.place_experts(placement)
            made = logits(pipeline.model, PROMPTS[rank % len(PROMPTS)])
            moe = pipeline.model.block(1).moe
            assert moe is not None
            seen.append((made, list(moe.experts.experts)))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_ranks_that_do_not_divide_the_experts_change_no_logit(name: str, tmp_path: Path) -> None:
    config, placements = UNITS[name]
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float64)
    initialize_weights(model, 7)
    foresee(model)
    ranks = run_ranks(int(name), serve_unit, tmp_path, name)
    for rank, seen in enumerate(ranks):
        expected = logits(model, PROMPTS[rank % len(PROMPTS)])
        for (made, experts), placement in zip(seen, placements, strict=True):
            torch.testing.assert_close(made, expected, atol=1e-10, rtol=0)
            assert experts == placement.slots(1)[rank].tolist()


def as_json(placement: Placement, **changes: object) -> object:
    shape = {name: getattr(placement.shape, name) for name in PlacementShape.__slots__}
    layers = {f"layer_{layer}": {"experts": placement.slots(layer).tolist()} for layer in placement.layers}
    return json.loads(json.dumps({**shape, "layers": layers} | changes))


def test_written_placement_is_read() -> None:
    again = Placement.read(as_json(PLACEMENT), "placement")
    assert again.shape == SHAPE
    assert all(np.array_equal(again.slots(layer), PLACEMENT.slots(layer)) for layer in range(5))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"layers": None}, ["must be what launch.place format=json writes"]),
        ({"num_ranks": 0}, ["must be what launch.place format=json writes"]),
        ({"num_ranks": 4.0}, ["must be what launch.place format=json writes"]),
        ({"num_nodes": "1"}, ["must be what launch.place format=json writes"]),
        ({"policy": "none"}, ["must be what launch.place format=json writes"]),
        ({"num_experts": 10**12, "num_redundant": 12 - 10**12}, ["must be what launch.place format=json writes"]),
        ({"num_ranks": 8}, ["must be what launch.place", "fill 8 ranks"]),
        ({"layers": {"layer_1": {"experts": [[0, 1, 2]] * 4}}}, ["layer 1 must place each of 8 experts"]),
        (
            {"layers": {"layer_1": {"experts": [[0, 0, 1], [2, 3, 4], [5, 6, 7], [1, 2, 3]]}}},
            ["layer 1 must not have two copies of an expert on a rank"],
        ),
        (
            {"layers": {"layer_1": {"experts": [[0, 1], [2, 3]]}}},
            ["layer 1 must list the experts of 4 ranks with 3 slots"],
        ),
    ],
)
def test_placement_that_cannot_be_served_is_refused(changes: dict[str, object], parts: list[str]) -> None:
    assert_refused(PlacementError, parts, lambda: Placement.read(as_json(PLACEMENT, **changes), "placement"))

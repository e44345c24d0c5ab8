"""Gives each rank the experts that the sampler chose for the tokens that the rank trains.

A rank records its own layers of the sequences that it samples. Training packs answers into other sequences. So ranks
that hold the same layers exchange records: each sends to another one what that one trains, and nothing else. All ranks
know every size in advance, because they know all answers and places.

Source: arXiv:2510.11370 (rollout routing replay). Shape legend: B sequences, T tokens, K experts per token, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from comm.protocol import Label
from infer.engines.protocol import RouteKey, SampledRoutes
from model.config import ModelConfig
from model.router import FREE_CHOICE, ReplayedRoutes, RouteError, Router, Routing, expert_id_dtype
from train.replica import Replica
from train.rollout.routes.plan import PlacedAnswer, RoutePiece, RoutePlan, RowOfAnswer, Share


@dataclass(frozen=True, slots=True)
class BatchRoutes:
    """Replays the sampler's choices in the tokens of answers (see `model.router.Routes`).

    Routers choose for padding, for the last token of an answer, and in MTP modules.

    Attributes:
        ids: experts of each record, TK.
        answers: of each direction and micro-batch.
        config: of the model.
    """

    ids: Mapping[RouteKey, NDArray[np.generic]]
    answers: Mapping[tuple[int, int], Sequence[RowOfAnswer]]
    config: ModelConfig

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        """Implements `Routes.route`.

        Raises:
            RouteError: a record is missing, has another length, or ids that are not experts of the router.
        """
        if label.layer >= self.config.num_layers:
            return router.route(logits_BTE)
        ids_NK = self.forced_ids(label, logits_BTE.shape[:2])
        return ReplayedRoutes({label: ids_NK.to(logits_BTE.device)}).route(label, router, logits_BTE)

    def forced_ids(self, label: Label, shape: Sequence[int]) -> Tensor:
        """Returns the experts of each token of a micro-batch, int64 NK; -1 where the router chooses."""
        num_choices = self.config.num_experts_per_token
        forced_BTK = np.full((*shape, num_choices), FREE_CHOICE, dtype=np.int64)
        for row, answer in self.answers.get((label.direction, label.micro_batch), ()):
            for sample, first, num_tokens in answer.records():
                key = RouteKey(answer.prompt, sample, label.layer)
                ids_TK = checked_record(self.ids, key, num_tokens)
                if first + num_tokens > shape[1] or ids_TK.shape[1] != num_choices:
                    raise RouteError(
                        f"{label}: record of prompt {key.prompt}, sample {key.sample} has the shape "
                        f"{list(ids_TK.shape)}, does not fit into {list(forced_BTK.shape)} at token {first}"
                    )
                forced_BTK[row, first : first + num_tokens] = ids_TK
        return torch.from_numpy(forced_BTK).flatten(0, 1)


def checked_record(ids: Mapping[RouteKey, NDArray[np.generic]], key: RouteKey, num_tokens: int) -> NDArray[np.generic]:
    """Returns a record.

    Args:
        ids: records, TK.

    Raises:
        RouteError: it is missing or has another length.
    """
    place = f"prompt {key.prompt}, sample {key.sample}, layer {key.layer}"
    if key not in ids:
        raise RouteError(f"{place}: no experts are recorded")
    if len(ids[key]) != num_tokens:
        raise RouteError(f"{place}: must have the experts of {num_tokens} tokens, has those of {len(ids[key])}")
    return ids[key]


class TrainedRoutes:
    """The experts of the tokens that this rank trains, for all batches of a step."""

    def __init__(self, plan: RoutePlan, ids: Mapping[RouteKey, NDArray[np.generic]], config: ModelConfig) -> None:
        """Stores the arguments.

        Args:
            ids: experts of each record that this rank needs, TK.
        """
        self._plan, self._ids, self._config = plan, ids, config

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all records."""
        return sum(ids_TK.nbytes for ids_TK in self._ids.values())

    def of_batches(self, count: int) -> tuple[BatchRoutes, ...]:
        """Returns the routes of the first batches."""
        return tuple(self.of_batch(number) for number in range(count))

    def of_batch(self, batch: int) -> BatchRoutes:
        """Returns the routes of a batch."""
        return BatchRoutes(self._ids, self._plan.rows_of(batch), self._config)


def exchange_routes(
    replica: Replica, sampled: SampledRoutes, homes: Mapping[int, Share], answers: Sequence[PlacedAnswer]
) -> TrainedRoutes:
    """Exchanges records within the group of ranks that hold the same stages. All ranks call it.

    Args:
        replica: the network that sampled and is trained.
        homes: data index and direction that sampled the answers to each prompt, by the prompt's number.
        answers: all answers of the job that are trained, in order; equal on all ranks.

    Raises:
        RouteError: a record of this rank is missing or has another length.
    """
    world, config = replica.world, replica.config.model
    plan, members = RoutePlan(replica, homes, answers), dist.get_process_group_ranks(world.groups.stage)
    outgoing = [plan.pieces(world.rank, rank) for rank in members]
    sent = [[checked_record(sampled.ids, each.key, each.num_tokens) for each in pieces] for pieces in outgoing]
    place = members.index(world.rank)
    # Own records are not sent.
    ids = {each.key: ids_TK for each, ids_TK in zip(outgoing[place], sent[place], strict=True)}
    sent[place] = []
    incoming = [[] if rank == world.rank else plan.pieces(rank, world.rank) for rank in members]
    return TrainedRoutes(plan, ids | _exchange(replica, sent, incoming), config)


def _exchange(
    replica: Replica, sent: Sequence[Sequence[NDArray[np.generic]]], incoming: Sequence[Sequence[RoutePiece]]
) -> dict[RouteKey, NDArray[np.generic]]:
    """Sends records to each member of the stage's group, and returns those that arrive."""
    world, config = replica.world, replica.config.model
    if len(sent) == 1:
        return {}
    dtype = expert_id_dtype(config.num_routed_experts)
    token_bytes = config.num_experts_per_token * dtype.itemsize
    input_splits = [sum(ids_TK.nbytes for ids_TK in part) for part in sent]
    output_splits = [token_bytes * sum(each.num_tokens for each in part) for part in incoming]
    flat = [torch.from_numpy(ids_TK).view(torch.uint8).flatten() for part in sent for ids_TK in part]
    sending = torch.cat([torch.empty(0, dtype=torch.uint8), *flat]).to(world.device)
    arrived = torch.empty(sum(output_splits), dtype=torch.uint8, device=world.device)
    # The group belongs to the reductions of gradients, which are complete when the weights are.
    replica.weight_updates.wait_all()
    with world.log.collective("stage", world.groups.stage, "experts of tokens"):
        dist.all_to_all_single(arrived, sending, output_splits, input_splits, group=world.groups.stage)
    pieces = [each for part in incoming for each in part]
    parts = arrived.cpu().split([token_bytes * each.num_tokens for each in pieces])  # host sync
    return {
        each.key: part.view(dtype).view(each.num_tokens, -1).numpy() for each, part in zip(pieces, parts, strict=True)
    }

"""Generates with a copy of the whole model on every rank.

The copy gets the weights of training before each request.

Shape legend: N tensors of the model, H bytes of a hash.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import exchange_reports, gather_present
from comm.dispatch.fp8 import Fp8Dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.protocol import Dispatcher
from infer.config import GenerateError, Statistics, check, sum_statistics
from infer.engines.local import LocalEngine
from infer.engines.protocol import NumberedPrompt, Request, Rollout, Rollouts
from infer.engines.weight_digests import TensorDigest
from model.transformer import named_tensors, whole
from train.network import build_model
from train.replica import Replica

_HASH_BYTES = 32


class WholeCopy:
    """A copy of the whole model of a replica on this rank, with the types that training has.

    Every rank has one.

    Attributes:
        model: the copy, with MTP modules if the model has them. Its weights are undefined before the first update.
        received_bytes: bytes that came from other ranks in the last update.
    """

    def __init__(self, replica: Replica) -> None:
        """Allocates the copy and agrees which rank sends each tensor.

        All ranks of the job call it at the same point.

        Args:
            replica: the network that is copied.
        """
        world, config = replica.world, replace(replica.config, seed=None)
        self._replica, self.received_bytes = replica, 0
        dispatcher: Dispatcher = LocalDispatcher(config.model.num_routed_experts)
        if config.dispatch.payload == "fp8":
            dispatcher = Fp8Dispatcher(dispatcher)  # rows that stay on a rank are rounded as sent ones are
        self.model = build_model(config, dispatcher, whole(config.model), world.device).requires_grad_(
            requires_grad=False
        )
        # The first rank that holds a tensor sends it.
        held, names = named_tensors(replica.network), list(named_tensors(self.model))
        holders_N = torch.tensor([world.rank if name in held else len(world.ranks) for name in names])
        senders_N = world.reduce(holders_N, "holders of weights", dist.ReduceOp.MIN)
        self._senders: dict[str, int] = dict(zip(names, senders_N.tolist(), strict=True))

    def update(self) -> None:
        """Copies the present weights, one tensor at a time, and compares their hashes. All ranks call it.

        Raises:
            GenerateError: on every rank, if a tensor of a copy differs from that of training.
        """
        world, own, copies = self._replica.world, named_tensors(self._replica.model), named_tensors(self.model)
        sent_NH = torch.zeros(len(copies), _HASH_BYTES, dtype=torch.uint8)
        arrived_NH, self.received_bytes = torch.zeros_like(sent_NH), 0
        for number, (name, copy) in enumerate(copies.items()):
            sender = self._senders[name]
            if sender == world.rank:
                sent_NH[number] = _hash(own[name])
                copy.copy_(own[name])
            else:
                self.received_bytes += copy.nbytes
            with world.log.collective("world", world.groups.world, f"copy of {name}"):
                dist.broadcast(copy, src=sender, group=world.groups.world)
            arrived_NH[number] = _hash(copy)
        self._compare(list(copies), sent_NH, arrived_NH)

    def _compare(self, names: Sequence[str], sent_NH: Tensor, arrived_NH: Tensor) -> None:
        """Compares the hashes of this rank's copy with those of the senders. Rows of other senders are zero.

        Raises:
            GenerateError: on every rank, about the first tensor that differs on any rank.
        """
        world, num_ranks = self._replica.world, len(self._replica.world.ranks)
        expected_NH = world.reduce(sent_NH, "hashes of weights")
        differing = (arrived_NH != expected_NH).any(dim=1).nonzero().flatten().tolist()
        none = len(names) * num_ranks
        own = differing[0] * num_ranks + world.rank if differing else none
        first = int(world.reduce(torch.tensor(own), "first weight that differs", dist.ReduceOp.MIN))
        if first < none:
            name, rank = names[first // num_ranks], first % num_ranks
            raise GenerateError(
                f"weights: {name} in the sampler's copy on rank {rank} must have the bytes of rank "
                f"{self._senders[name]}, which trains it, has others"
            )


class GatheredEngine:
    """An engine that continues each prompt on one rank, with a copy of the whole model.

    Every rank has one. A rank that completes its prompts waits for the others, at most `cluster.timeout_seconds`.
    """

    def __init__(self, replica: Replica) -> None:
        """Allocates the copy. All ranks of the job call it at the same point.

        Args:
            replica: the network; its weights may change between calls.
        """
        self._world = replica.world
        self.copy = WholeCopy(replica)
        self._engine = LocalEngine(self.copy.model)

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`. Every rank returns all rollouts.

        Routes are those of the prompts that this rank continued.
        """
        check(self.copy.model.config, [prompt.tokens for prompt in prompts], request.max_new_tokens, "auto", 1)
        began = time.perf_counter()
        self.copy.update()
        found, problem = Rollouts(rollouts=(), statistics=Statistics()), ""
        try:
            found = self._engine.generate(prompts[self._world.rank :: len(self._world.ranks)], request)
        except GenerateError as error:
            problem = str(error)
        gathered = self._gather(found, problem)
        by_place = {(each.prompt, each.sample): each for rollouts, _ in gathered for each in rollouts}
        statistics = sum_statistics([each for _, each in gathered], time.perf_counter() - began)
        order = [(prompt.number, sample) for prompt in prompts for sample in range(request.samples)]
        rollouts = tuple(by_place[place] for place in order)
        return Rollouts(rollouts=rollouts, statistics=statistics, routes=found.routes)

    def close(self) -> None:
        """Does nothing, because the engine opened no links."""

    def _gather(self, own: Rollouts, problem: str) -> list[tuple[tuple[Rollout, ...], Statistics]]:
        """Returns the rollouts and statistics of the ranks that continued a prompt.

        Raises:
            GenerateError: on every rank, if one of them has a problem.
        """
        group = self._world.groups.world
        with self._world.log.collective("world", group, "rollouts of all ranks"):
            if text := exchange_reports(problem or None, group).first_text:
                raise GenerateError(text)
            return gather_present((own.rollouts, own.statistics) if own.rollouts else None, group)


def _hash(tensor: Tensor) -> Tensor:
    """Returns the SHA-256 of a tensor's bytes, H."""
    return torch.frombuffer(bytearray.fromhex(TensorDigest.of(tensor).sha256), dtype=torch.uint8)

"""Samples with the network that is trained, in its place or with a whole copy on every rank.

Shape legend: N tensors of the model, H bytes of a hash.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import exchange_reports, gather_present
from comm.dispatch.build import Fp8Dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.protocol import Dispatcher
from infer.batch import PROMPT_TOKENS
from infer.config import GenerateError, Statistics, check, sum_statistics
from infer.engines.local import LocalEngine
from infer.engines.pipelined import CohortSizes, PipelinedEngine
from infer.engines.vllm import TensorDigest
from infer.protocol import Engine, NumberedPrompt, Request, Rollouts, Sample
from model.transformer import named_tensors, whole
from train.post.pipeline import ReplicaPipeline
from train.replica import Replica
from train.world import build_model

_HASH_BYTES = 32


class TrainingEngine(Engine, Protocol):
    """Protocol of an engine that a training run opens and closes."""

    def close(self) -> None:
        """Closes what the engine opened. All ranks call it at the same point."""
        ...


class ReplicaEngine:
    """An engine over a replica that is trained between two calls. No weight moves. Every rank has one."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._pipeline = ReplicaPipeline(replica)
        # Dispatchers are built for the tokens of a micro-batch.
        most = replica.config.tokens.max_tokens
        sizes = CohortSizes(max_rows=min(CohortSizes().max_rows, most), prefill_tokens=min(PROMPT_TOKENS, most))
        self._engine = PipelinedEngine(self._pipeline, sizes=sizes)

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`. Every rank returns all rollouts."""
        with self._replica.model.weights_unchanged():
            rollouts = self._engine.generate(prompts, request)
        self._replica.discard_counts()
        return rollouts

    def close(self) -> None:
        """Closes the links. All ranks call it at the same point."""
        self._pipeline.close()


class WholeCopy:
    """A copy of the whole model of a replica on this rank, with the types that training has."""

    def __init__(self, replica: Replica) -> None:
        """Allocates the copy and agrees which rank sends each tensor. All ranks of the job call it."""
        world = replica.world
        config = replace(replica.config, seed=None)
        self._replica = replica
        self.received_bytes = 0
        dispatcher: Dispatcher = LocalDispatcher(config.model.num_routed_experts)
        if config.dispatch.payload == "fp8":
            dispatcher = Fp8Dispatcher(dispatcher)  # rows that stay on a rank are rounded as sent ones are
        self.model = build_model(config, dispatcher, whole(config.model), world.device).requires_grad_(
            requires_grad=False
        )
        # The first rank that holds a tensor sends it.
        tensors = named_tensors(replica.network)
        names = list(named_tensors(self.model))
        holders_N = torch.tensor([world.rank if name in tensors else len(world.ranks) for name in names])
        senders_N = world.reduce(holders_N, "holders of weights", dist.ReduceOp.MIN)
        self._senders: dict[str, int] = dict(zip(names, senders_N.tolist(), strict=True))

    def update(self) -> None:
        """Copies the present weights, one tensor at a time, and compares their hashes. All ranks call it."""
        world = self._replica.world
        tensors = named_tensors(self._replica.model)
        copies = named_tensors(self.model)
        sent_NH = torch.zeros(len(copies), _HASH_BYTES, dtype=torch.uint8)
        arrived_NH = torch.zeros_like(sent_NH)
        self.received_bytes = 0
        for number, (name, copy) in enumerate(copies.items()):
            sender = self._senders[name]
            if sender == world.rank:
                sent_NH[number] = _hash(tensors[name])
                copy.copy_(tensors[name])
            else:
                self.received_bytes += copy.nbytes
            with world.log.collective("world", world.groups.world, f"copy of {name}"):
                dist.broadcast(copy, src=sender, group=world.groups.world)
            arrived_NH[number] = _hash(copy)
        self._compare(list(copies), sent_NH, arrived_NH)

    def _compare(self, names: Sequence[str], sent_NH: Tensor, arrived_NH: Tensor) -> None:
        """Compares the hashes of this rank's copy with those of the senders. Rows of other senders are zero."""
        world = self._replica.world
        num_ranks = len(world.ranks)
        expected_NH = world.reduce(sent_NH, "hashes of weights")
        differing = (arrived_NH != expected_NH).any(dim=1).nonzero().flatten().tolist()
        none = len(names) * num_ranks
        first_here = differing[0] * num_ranks + world.rank if differing else none
        first = int(world.reduce(torch.tensor(first_here), "first weight that differs", dist.ReduceOp.MIN))
        if first < none:
            name = names[first // num_ranks]
            raise GenerateError(
                f"weights: {name} in the sampler's copy on rank {first % num_ranks} must have the bytes of rank "
                f"{self._senders[name]}, which trains it, has others"
            )


class GatheredEngine:
    """An engine that continues each prompt on one rank, with a copy of the whole model.

    Every rank has one. A rank that completes its prompts waits for the others, at most `cluster.timeout_seconds`.
    """

    def __init__(self, replica: Replica) -> None:
        """Allocates the copy. All ranks of the job call it; weights may change between calls."""
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
        sampled = Rollouts(rollouts=(), statistics=Statistics())
        problem = ""
        try:
            sampled = self._engine.generate(prompts[self._world.rank :: len(self._world.ranks)], request)
        except GenerateError as error:
            problem = str(error)
        gathered = self._gather(sampled, problem)
        by_place = {(rollout.prompt, rollout.sample): rollout for rollouts, _ in gathered for rollout in rollouts}
        statistics = sum_statistics([part for _, part in gathered], time.perf_counter() - began)
        order = [(prompt.number, sample) for prompt in prompts for sample in range(request.samples)]
        rollouts = tuple(by_place[key] for key in order)
        return Rollouts(rollouts=rollouts, statistics=statistics, routes=sampled.routes)

    def close(self) -> None:
        """Does nothing, because the engine opened no links."""

    def _gather(self, sampled: Rollouts, problem: str) -> list[tuple[tuple[Sample, ...], Statistics]]:
        """Returns the rollouts and statistics of the ranks that continued a prompt."""
        group = self._world.groups.world
        with self._world.log.collective("world", group, "rollouts of all ranks"):
            if text := exchange_reports(problem or None, group).first_text:
                raise GenerateError(text)
            return gather_present((sampled.rollouts, sampled.statistics) if sampled.rollouts else None, group)


def _hash(tensor: Tensor) -> Tensor:
    """Returns the SHA-256 of a tensor's bytes, H."""
    return torch.frombuffer(bytearray.fromhex(TensorDigest.of(tensor).sha256), dtype=torch.uint8)

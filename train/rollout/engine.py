"""Generates with a replica where training left its weights."""

from collections.abc import Sequence
from typing import Protocol

from infer.batch import PROMPT_TOKENS
from infer.engines.pipelined.engine import CohortSizes, PipelinedEngine
from infer.engines.protocol import Engine, NumberedPrompt, Request, Rollouts
from train.decoding.replica_pipeline import ReplicaPipeline
from train.replica import Replica


class TrainingEngine(Engine, Protocol):
    """Protocol of an engine that a training run opens and closes."""

    def close(self) -> None:
        """Closes what the engine opened. All ranks call it at the same point."""
        ...


class ReplicaEngine:
    """An engine over a replica that is trained between two calls. No weight moves. Every rank has one."""

    def __init__(self, replica: Replica) -> None:
        """Opens the links. All ranks of the job call it at the same point."""
        self._replica = replica
        self._pipeline = ReplicaPipeline(replica)
        # Dispatchers are built for the tokens of a micro-batch.
        most = replica.config.tokens.max_tokens
        defaults = CohortSizes()
        sizes = CohortSizes(max_rows=min(defaults.max_rows, most), prefill_tokens=min(PROMPT_TOKENS, most))
        self._engine = PipelinedEngine(self._pipeline, sizes=sizes)

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`. Every rank returns all rollouts."""
        with self._replica.model.weights_unchanged():
            rollouts = self._engine.generate(prompts, request)
        # Records of steps count the traffic of the training pass.
        self._replica.observers.traffic.take()
        self._replica.observers.clips.take()
        return rollouts

    def close(self) -> None:
        """Closes the links. All ranks call it at the same point."""
        self._pipeline.close()

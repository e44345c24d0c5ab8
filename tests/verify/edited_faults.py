"""Faults that are edits of one line of the sources, made in rank processes, and what a verification says of each."""

import importlib
import inspect
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit of a function, `module:name`, on some ranks, and a pattern of the report on it."""

    path: str
    old: str
    new: str
    report: str
    ranks: tuple[int, ...] = (0, 1, 2, 3)

    def plant(self, rank: int, stack: ExitStack) -> None:
        """Gives the function the edited code until the stack closes, wherever it was imported."""
        if rank not in self.ranks:
            return
        place, _, name = self.path.partition(":")
        module = importlib.import_module(place)
        function: Any = module
        for part in name.split("."):
            function = getattr(function, part)
        function = inspect.unwrap(function)
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
        text = "\n".join(lines[next(at for at, line in enumerate(lines) if line[0] != "@") :])
        assert self.old in text, f"{self.path} has no {self.old!r}"
        made: dict[str, Any] = {}
        exec(
            compile(f"from __future__ import annotations\n{text.replace(self.old, self.new)}", self.path, "exec"),
            module.__dict__,
            made,
        )
        stack.callback(setattr, function, "__code__", function.__code__)
        function.__code__ = made[function.__name__].__code__


EDITS = {
    "loads are not summed": Edit(
        "train.core.step:update_router_bias",
        'load_LE = world.reduce(load_LE, "sum of router loads")',
        "pass",
        "weight of .*bias: .*the (data|micro-batch) axis",
    ),
    "loads of a step are kept": Edit(
        "train.core.step:update_router_bias",
        "gate.load.zero_()",
        "pass",
        "weight of .*bias: .*the (data|micro-batch) axis",
    ),
    "loss divided twice": Edit(
        "train.core.step:reduce_losses",
        "total / (n or 1)",
        "total / ((n or 1) * 2)",
        "0.5 times the expected value",
    ),
    "average takes the other share": Edit(
        "train.core.learner:ParameterEma._average",
        "alpha=1 - self._decay",
        "alpha=self._decay",
        "average of .*the configured optimizer",
    ),
    "average of the bias": Edit(
        "train.core.learner:ParameterEma._average",
        "if name.endswith(BIAS)",
        "if False",
        "average of .*bias",
    ),
    "average misses a weight": Edit(
        "train.core.learner:ParameterEma.update",
        "for name, weight in weights.items():",
        "for name, weight in list(weights.items())[:-1]:",
        "rank 2: average of",
        (2,),
    ),
    "direction 1 repeats sequences": Edit(
        "train.core.replica:Replica.first_sequence",
        "before + micro_batch",
        "micro_batch",
        "the directions axis",
    ),
    "all replicas read the first part": Edit(
        "train.core.replica:Replica.first_sequence",
        "self.world.data_index *",
        "0 *",
        "rank 1: gradient of .*the data axis",
    ),
    "context ranks count targets each": Edit(
        "train.core.replica:BatchReader._take_parts",
        " and world.context_index == 0",
        "",
        "it is 0.25 times .*the context axis",
    ),
    "documents lost in parts": Edit(
        "train.core.replica:held_part",
        "documents=whole.documents",
        "documents=None",
        "slices axis",
    ),
    "no clipping": Edit(
        "train.optim.adamw:ReplicatedAdamW.update",
        "min(1.0, self._clip_norm / (norm + 1e-6))",
        "1.0",
        "weight of .*step 1 .*the data axis",
    ),
    "norm counts replicas": Edit(
        "train.optim.adamw:ReplicatedAdamW.reduce",
        "/ dist.get_world_size(group)",
        "",
        "gradient norm of .*the (data|expert|pipeline) axis",
    ),
    "experts summed over the dense group": Edit(
        "train.optim.adamw:ReplicatedAdamW.reduce",
        "(groups.experts, self._replicas.experts)",
        "(groups.experts, self._replicas.dense)",
        "reduced gradient of .*experts.*the expert axis",
    ),
    "vectors decay": Edit(
        "train.optim.adamw:ReplicatedAdamW.__init__",
        '"weight_decay": 0.0',
        '"weight_decay": config.weight_decay',
        "weight of .*layernorm.*the data axis",
    ),
    "zero1 divides sums": Edit(
        "train.optim.zero1:Zero1AdamW.reduce",
        "scale = dist.get_world_size(self._replicas.dense)",
        "scale = 1",
        "norm.*configured optimizer",
    ),
    "zero1 shard not copied": Edit(
        "train.optim.zero1:Zero1AdamW._step",
        "piece.weight.copy_(host.narrowed(piece.master) if host else piece.master)",
        "pass",
        "weight of .*the configured optimizer",
        (1,),
    ),
    "zero1 does not count steps": Edit(
        "train.optim.zero1:Zero1AdamW.update",
        '["step"] += 1',
        '["step"] += 0',
        "checkpoint|after a resume",
    ),
    "zero1 does not clip": Edit(
        "train.optim.zero1:Zero1AdamW.update",
        "optimizer.unscale_and_clip_grads([piece.gradient for piece in bucket], total_norm)",
        "pass",
        "weight of .*the configured optimizer",
    ),
    "norm of own units alone": Edit(
        "train.optim.staged:StagedAdamW.norm",
        "dist.all_reduce(squares, group=self._world)",
        "pass",
        "gradient norm of .*the (data|expert|pipeline) axis",
    ),
    "rate doubled on a rank": Edit(
        "train.optim.staged:StagedAdamW.update",
        "learning_rate, self._norm",
        "2 * learning_rate, self._norm",
        "rank 1: weight of .*its update is 2 times",
        (1,),
    ),
    "slice balance divides once": Edit(
        "model.router:Routing._balance_of_slice",
        "/ lengths**2",
        "/ lengths",
        "gate.weight.*slices axis",
    ),
    "document counts of one context rank": Edit(
        "model.router:Routing._balance_of_documents",
        "context.sum(counts)",
        "counts",
        "gate.weight.*context axis",
    ),
    "arrived rows unsorted": Edit(
        "comm.dispatch.all_to_all:AllToAllPlanner.complete",
        "sorted_A = _expert_major(received_RL, sum(received))",
        "sorted_A = torch.arange(sum(received))",
        "gradient of .*experts.*the expert axis",
    ),
    "arrived weights unsorted": Edit(
        "comm.dispatch.all_to_all:AllToAllDispatcher.dispatch",
        "form.part(bytes_AB, 1), route.sorted_A)",
        "form.part(bytes_AB, 1), None)",
        "gradient of .*experts.*the expert axis",
    ),
    "weights' gradients unsorted": Edit(
        "comm.dispatch.all_to_all:AllToAllDispatcher.dispatch_backward",
        "_reorder(grad_weights_A[:, None], route.arrival_A,",
        "_reorder(grad_weights_A[:, None], None,",
        "gate.weight.*the expert axis",
    ),
    "combined rows scaled on a rank": Edit(
        "comm.dispatch.all_to_all:AllToAllDispatcher.combine",
        "route.order.sum_rows(form.part(bytes_SB, 0))",
        "route.order.sum_rows(form.part(bytes_SB, 0)) * 1.001",
        "rank 2: gradient",
        (2,),
    ),
    "a rank loses the last row's gradient": Edit(
        "comm.dispatch.all_to_all:AllToAllDispatcher.dispatch_backward",
        "grad_weights_TK = route",
        "form.part(bytes_SB, 0)[-1:].zero_(); grad_weights_TK = route",
        "gradient of",
        (3,),
    ),
    "hidden state sent in float16": Edit(
        "comm.transfers:HostLink.send",
        'payload = as_bytes(tensor.to("cpu"))',
        'payload = as_bytes(tensor.to("cpu").half().to(tensor.dtype))',
        "pipeline axis",
        (1,),
    ),
    "gradient sent twice as large": Edit(
        "comm.transfers:HostLink.send",
        'payload = as_bytes(tensor.to("cpu"))',
        'payload = as_bytes(tensor.to("cpu") * (2 if key.kind == "gradient" else 1))',
        "gradient of .*the pipeline axis",
        (3,),
    ),
    "context sum leaves out the last": Edit(
        "comm.context_group:ordered_sum",
        "for part in parts[1:]:",
        "for part in parts[1:-1]:",
        "context axis",
    ),
    "later slices' gradients lost": Edit(
        "model.slices:SliceContext.collect",
        "later = gradients.pop(self._slice, None)",
        "gradients.pop(self._slice, None); later = None",
        "slices axis",
    ),
    "slice gradients overwritten": Edit(
        "model.slices:SliceContext.collect",
        "gradients[index] += part",
        "gradients[index] = part",
        "slices axis",
    ),
    "slice does not attend to the first": Edit(
        "model.slices:SliceContext.visit",
        "range(self._slice - 1, -1, -1)",
        "range(self._slice - 1, 0, -1)",
        "slices axis",
    ),
    "weight gradients of a phase left out": Edit(
        "dualpipe.runtime.execute:_run",
        "run.weight(step.phase)",
        "run.weight(step.phase) if step.phase else None",
        "rank 0: gradient of .*it is 0 times",
        (0,),
    ),
    "input gradient instead of the output's": Edit(
        "model.stage:StageRun.set_output_gradient",
        "HiddenGradients(gradient_BTD)",
        "HiddenGradients(gradient_BTD.flip(0))",
        "gradient of .*the pipeline axis",
        (0,),
    ),
}

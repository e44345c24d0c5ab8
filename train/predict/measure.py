"""Measures what each phase keeps, by running the model on tensors without memory.

No formula repeats the model: its blocks run forward and backward on torch's meta device, where launchers of kernels for
CUDA allocate but launch nothing, and the storages that are alive are counted.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comm.context_group import GatherContext, LinkedContext, RingContext
from comm.protocol import ALONE, Arrived, CompletedWork, ContextGroup, Dispatcher, Label, Work, sliced_parts
from kernels.attention import SIZED_CPU, SIZED_CUDA, SIZED_CUDA_PADDED
from kernels.launch import without_launches
from model.linear import GradientStore
from model.objective import LossSums, MicroBatch
from model.objectives.pairs import SCORE, head_objective
from model.slices import RunPlace, SlicedSequences
from model.stage import Stage, StageRun
from model.transformer import Part, Transformer
from train.predict.rank_bytes import PartName, PhaseBytes, PhaseKind, Sizes

_TYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_LARGEST_NUMBER_BYTES = 8
"""Tensors of at most this size are single numbers, such as a loss, and are not counted."""


def measure_part(by_slice: Sequence[Sizes], part: PartName) -> list[list[PhaseBytes]]:
    """Returns the bytes of the phases of one part of a stage, for each slice.

    A dispatcher's buffers are not among them.
    """
    # References in FP8 read numbers on the host.
    on_cpu = by_slice[0].device == "cpu" and not by_slice[0].is_fp8
    with torch.device("meta"), nullcontext() if on_cpu else without_launches():
        runs = _PartRuns(by_slice, part)
        with runs.model.weights_unchanged():
            # What is made once and stays, rotations and FP8 weights, is there then.
            runs.run_forwards()
            with _LiveStorages() as storages:
                return runs.measure(storages)


class _LiveStorages(TorchDispatchMode):
    """Storages that operators make while it is on. Those of their inputs are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._created: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, which takes as long as importing torch.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        inputs: set[int] | None = None
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                if inputs is None:
                    operands = tree_leaves((args, kwargs))
                    inputs = {x.untyped_storage()._cdata for x in operands if isinstance(x, Tensor)}
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs:
                    self._created[storage._cdata] = weakref.ref(storage)
        self._peak = max(self._peak, self.live_bytes())
        return results

    def live_bytes(self) -> int:
        """Returns the bytes of live storages."""
        live = {key: storage for key, reference in self._created.items() if (storage := reference()) is not None}
        self._created = {key: self._created[key] for key in live}
        return sum(map(_size, live.values()))

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Returns the bytes of those storages of some tensors that are counted, each once."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        return sum(_size(storage) for key, storage in storages.items() if key in self._created)

    def peak_of(self, action: Callable[[], None]) -> int:
        """Runs an action, and returns the largest number of live bytes inside it, above those before it."""
        before = self.live_bytes()
        self._peak = before
        action()
        return self._peak - before


def _size(storage: torch.UntypedStorage) -> int:
    size = storage.nbytes()
    return size if size > _LARGEST_NUMBER_BYTES else 0


@dataclass(frozen=True, slots=True)
class _Account:
    """What the runs of a measurement hold."""

    storages: _LiveStorages
    runs: Sequence[StageRun]
    sequences: SlicedSequences

    def kept_bytes(self) -> int:
        """Returns the bytes that all runs keep for their backward."""
        return self.storages.bytes_of(tensor for run in self.runs for tensor in run.kept())

    def resident_bytes(self) -> int:
        """Returns the bytes of what later slices attend or add to."""
        return self.storages.bytes_of(self.sequences.shared())

    def carried_bytes(self) -> int:
        """Returns the bytes of gradients of earlier slices' rows."""
        return self.storages.bytes_of(self.sequences.carried())

    def gradient_bytes(self, run: StageRun) -> int:
        """Returns the bytes of a run's gradients between two phases that it does not keep for its backward."""
        kept_tensors = list(run.kept())
        return self.storages.bytes_of([*run.gradient_tensors(), *kept_tensors]) - self.storages.bytes_of(kept_tensors)


class _PartRuns:
    """Runs of one part of a stage: of one micro-batch, or of all slices of some sequences."""

    def __init__(self, by_slice: Sequence[Sizes], part: PartName) -> None:
        sizes = by_slice[0]
        config = sizes.config
        first_layer = {"dense": 0, "moe": config.num_dense_layers}.get(part)
        layers = range(0) if first_layer is None else range(first_layer, first_layer + 1)
        is_last = part == "head"
        modules = range(config.num_layers, config.num_layers + config.mtp_depth) if is_last else ()
        attention = SIZED_CUDA_PADDED if sizes.pads_heads else SIZED_CUDA
        self._part = part
        self._batches = [_batch(sizes_of_slice) for sizes_of_slice in by_slice]
        self.model = Transformer(
            config,
            EvenDispatcher(
                sizes.num_local_experts,
                {sizes_of_slice.num_tokens: sizes_of_slice.expert_rows for sizes_of_slice in by_slice},
            ),
            _TYPES[sizes.value_bytes],
            Part(layers=(*layers, *modules), experts=range(sizes.num_local_experts), embedding=True, head=is_last),
            replace(sizes.computing, attention=SIZED_CPU if sizes.device == "cpu" else attention),
            context=context_of(sizes.context, sizes.kept_ranks),
        )
        self._stage = Stage(self.model, layers, first=part == "embedding", last=is_last)
        # A block's exchanges are a dispatch and a combine.
        exchanges: Iterator[PhaseKind] = cycle(("dispatch", "combine"))
        self._kinds = ["compute" if lane == "compute" else next(exchanges) for lane in self._stage.lanes]
        self._store = GradientStore(self.model.parameters())
        lengths = [sizes.context * sizes_of_slice.tokens for sizes_of_slice in by_slice]
        self._slices = sliced_parts(lengths, sizes.context)
        self._objective, names = head_objective(config, 1.0)
        self._sums = LossSums(names)

    def run_forwards(self) -> None:
        """Runs forwards without a backward."""
        runs, _ = self._start(None)
        for index, run in enumerate(runs):
            self._set_input(run, index)
            for phase in range(len(self._stage.lanes)):
                self._forward(run, phase)

    def measure(self, storages: _LiveStorages) -> list[list[PhaseBytes]]:
        """Runs the forwards of all slices, then their backwards, the last slice first."""
        runs, sequences = self._start(self._store)
        account = _Account(storages, runs, sequences)
        sizes = []
        for index, run in enumerate(runs):
            self._set_input(run, index)
            sizes.append([self._measure_forward(run, phase, account) for phase in range(len(self._stage.lanes))])
            if self._part != "head":
                run.output()
        for index, run in reversed(list(enumerate(runs))):
            if self._part != "head":
                run.set_output_gradient(torch.empty_like(self._hidden_BTD(index)))
            sizes[index] = self._measure_backward(run, sizes[index], account)
        return sizes

    def _measure_forward(self, run: StageRun, phase: int, account: "_Account") -> PhaseBytes:
        before = account.kept_bytes()
        resident_before = account.resident_bytes()
        peak = account.storages.peak_of(partial(self._forward, run, phase))
        kept_after = account.kept_bytes()
        return PhaseBytes(
            kind=self._kinds[phase],
            values=account.storages.live_bytes() - kept_after,
            kept=kept_after - before,
            resident=account.resident_bytes() - resident_before,
            forward_peak=peak,
        )

    def _measure_backward(self, run: StageRun, sizes: list[PhaseBytes], account: "_Account") -> list[PhaseBytes]:
        """Adds the sizes of a run's backward and W."""
        live_bytes = [0] * len(sizes)
        sizes = list(sizes)
        for phase in reversed(range(len(sizes))):
            kept_before = account.kept_bytes()
            carried_before = account.carried_bytes()
            peak = account.storages.peak_of(partial(self._backward, run, phase))
            kept_after = account.kept_bytes()
            carried = account.carried_bytes()
            live_bytes[phase] = account.storages.live_bytes() - kept_after - carried
            sizes[phase] = replace(
                sizes[phase],
                gradients=account.gradient_bytes(run),
                released=kept_before - kept_after,
                carried=carried - carried_before,
                backward_peak=peak,
            )
        if self._part != "embedding":
            run.input_gradient()
        # What several phases wait with counts for the last of them.
        waiting = 0
        for phase in reversed(range(len(sizes))):
            if sizes[phase].kind == "compute":
                before = account.storages.live_bytes()
                peak = account.storages.peak_of(partial(run.weight, phase))
                freed = before - account.storages.live_bytes()
                sizes[phase] = replace(sizes[phase], waiting=freed, weight_peak=peak)
            waiting += sizes[phase].waiting
            sizes[phase] = replace(sizes[phase], shared=sizes[phase].gradients + waiting - live_bytes[phase])
        return sizes

    def _start(self, store: GradientStore | None) -> tuple[list[StageRun], SlicedSequences]:
        """Returns a run for each slice, and what slices share."""
        sequences = SlicedSequences(self._slices)
        is_sliced = len(self._batches) > 1
        runs = []
        for index, batch in enumerate(self._batches):
            run_place = RunPlace(sequences=sequences, index=index) if is_sliced else RunPlace()
            runs.append(self._stage.start(batch, self._objective, self._sums, store, place=run_place))
        return runs, sequences

    def _set_input(self, run: StageRun, index: int) -> None:
        if self._part != "embedding":
            run.set_input(self._hidden_BTD(index))

    def _hidden_BTD(self, index: int) -> Tensor:
        """Returns the hidden state of a slice between two stages."""
        with torch.no_grad():
            return self.model.embed(self._batches[index].inputs_BT[0], None)

    def _forward(self, run: StageRun, phase: int) -> None:
        run.forward(phase)
        if self._stage.lanes[phase] == "comm":
            run.wait()

    def _backward(self, run: StageRun, phase: int) -> None:
        run.backward(phase)
        if self._stage.lanes[phase] == "comm":
            run.wait()


def _batch(sizes: Sizes) -> MicroBatch:
    """Returns a micro-batch with one answer for each sequence, for a score head to rank."""
    shape = (sizes.sequences, sizes.tokens)
    tokens = [torch.empty(shape, dtype=torch.int64) for _ in range(sizes.config.mtp_depth + 2)]
    extras = {SCORE: torch.empty(shape, dtype=torch.int16)}
    return MicroBatch(inputs_BT=tuple(tokens[:-1]), targets_BT=tuple(tokens[1:]), extras=extras)


@dataclass(frozen=True, slots=True)
class EvenHandle:
    """Number of tokens, and of the rows that arrive for them."""

    num_tokens: int
    num_choices: int
    num_rows: int


class EvenDispatcher(Dispatcher):
    """Delivers equally many rows to every local expert."""

    def __init__(self, num_local_experts: int, rows: Mapping[int, int]) -> None:
        """Stores the arguments; `rows` is the number of arriving rows by number of tokens."""
        self.num_local_experts = num_local_experts
        self._rows = rows

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> EvenHandle:
        """Implements `Dispatcher.plan`."""
        num_tokens, num_choices = ids_TK.shape
        return EvenHandle(num_tokens, num_choices, self._rows[num_tokens])

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: EvenHandle) -> Work[Arrived]:  # type: ignore[override]
        """Implements `Dispatcher.dispatch`."""
        rows_per_expert, rest = divmod(handle.num_rows, self.num_local_experts)
        counts = (rows_per_expert + 1,) * rest + (rows_per_expert,) * (self.num_local_experts - rest)
        rows_AD = rows_TD.new_empty(handle.num_rows, rows_TD.shape[1])
        return CompletedWork(Arrived(rows_AD, weights_TK.new_empty(handle.num_rows), counts))

    def dispatch_again(self, rows_TD: Tensor, handle: EvenHandle) -> Work[Tensor]:  # type: ignore[override]
        """Implements `Dispatcher.dispatch_again`."""
        return CompletedWork(rows_TD.new_empty(handle.num_rows, rows_TD.shape[1]))

    def combine(self, rows_AD: Tensor, handle: EvenHandle) -> Work[Tensor]:  # type: ignore[override]
        """Implements `Dispatcher.combine`."""
        return CompletedWork(rows_AD.new_empty(handle.num_tokens, rows_AD.shape[1]))

    def dispatch_backward(  # type: ignore[override]
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: EvenHandle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Implements `Dispatcher.dispatch_backward`."""
        weights_TK = grad_weights_A.new_empty(handle.num_tokens, handle.num_choices)
        return CompletedWork((self.combine(grad_rows_AD, handle).wait(), weights_TK))

    def combine_backward(self, grad_TD: Tensor, handle: EvenHandle) -> Work[Tensor]:  # type: ignore[override]
        """Implements `Dispatcher.combine_backward`."""
        return self.dispatch_again(grad_TD, handle)

    def close(self) -> None:
        """Implements `Dispatcher.close`."""


class _Link:
    """Replaces `comm.context_group.ContextLink`."""

    index = 0

    def __init__(self, size: int) -> None:
        self.members = tuple(range(size))

    def start_gather(self, packed: Tensor) -> Work[list[Tensor]]:
        return CompletedWork([torch.empty_like(packed) for _ in self.members])

    def start_exchange(self, parts: Tensor) -> Work[Tensor]:
        return CompletedWork(torch.empty_like(parts))

    def start_shift(self, sent: Tensor, name: str) -> Work[Tensor]:
        return CompletedWork(torch.empty_like(sent))

    def sum(self, values: Tensor) -> Tensor:
        return torch.empty_like(values)


def context_of(size: int, kept_ranks: int) -> ContextGroup:
    """Returns the context group of ranks that share each sequence; they form a ring if they keep no rows."""
    if size == 1:
        return ALONE
    context: type[LinkedContext] = GatherContext if kept_ranks else RingContext
    return context(_Link(size))  # type: ignore[arg-type, return-value]

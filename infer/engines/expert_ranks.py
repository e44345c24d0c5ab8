"""Serves with experts spread over ranks: each rank continues its share of requests in common rounds.

Every rank has its own cache, and all weights but those of other ranks' experts. Rank 0 has the HTTP server and sends
requests to the ranks. In a round each rank runs at most one decoding pass and reads at most one chunk of prompts. Ranks
agree before each pass of the model: those without such a pass only run the experts of its layers for the others. If the
first ranks read all prompts, sequences move to the others with their values in the caches.

Shape legend: N new tokens, T tokens of a sequence, C cached values per token, D hidden size, L layers, E experts.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import IntEnum
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from comm.agreement import broadcast_first, gather_on_first, smallest_over_ranks, sum_over_ranks
from comm.config import ParallelismConfig
from comm.exits import EXIT_LOST
from comm.groups import is_peer_error, make_host_group
from comm.layout import Layout
from comm.protocol import Work
from comm.transfers import MessageKey, PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.builder import DECODE_KIND
from dualpipe.ir import Op, Operation, Schedule
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import execute, open_clock
from dualpipe.runtime.pairing import overlapped
from dualpipe.runtime.program import ForwardOnlyRun, Lane
from dualpipe.validate import validate
from infer.continuous import ContinuousEngine, MovedSequence, SequenceUpdate
from infer.decoder import Decoder, Passage, PassKind
from infer.expert_moves import expert_loads
from infer.placement import Placement
from infer.protocol import NumberedPrompt, Request


class LostRankError(RuntimeError):
    """A rank of the server has ended or does not respond."""

    exit_code = EXIT_LOST


class Pass(IntEnum):
    """Kinds of passes, in their order within a round."""

    DRAFT = 0
    STEP = 1
    PROMPTS = 2
    PAIRS = 3
    NONE = 4


LEAST_OVERLAPPED = 2048
"""Tokens of a rank from which two micro-batches take at most 1.1 times the CPU time of one, as measured."""
_MOST_TOKENS = 2**32


class PassageRun(ForwardOnlyRun):
    """One micro-batch in a passage, phase by phase, as the interpreter of training runs it."""

    def __init__(self, passage: Passage) -> None:
        self._passage = passage
        self._start: Callable[[], Work[Any]] | None = None
        self._work: Work[Any] | None = None
        self._arrived: Any = None
        self.output_ND: Tensor | None = None

    def forward(self, phase: int) -> None:
        """Computes up to the next exchange, or starts that exchange."""
        if self._start is not None:
            self._work = self._start()
            self._start = None
            return
        try:
            self._start = self._passage.send(self._arrived)
        except StopIteration as end:
            self.output_ND = end.value

    def wait(self) -> None:
        """Completes the exchange that is running."""
        assert self._work is not None
        self._arrived = self._work.wait()
        self._work = None

    # No stage is before or after this one.
    set_input = output = ForwardOnlyRun.input_gradient


@dataclass(frozen=True, slots=True)
class PassageStage:
    """Two micro-batches as the only stage of a pipeline."""

    lanes: Sequence[Lane]
    runs: Sequence[PassageRun] = ()

    def start(self, direction: int, micro_batch: int) -> PassageRun:
        """Returns the run of a micro-batch."""
        return self.runs[micro_batch]


class NoLinks:
    """Transport of a pipeline with one rank, which sends no message."""

    def _refuse(self, *arguments: object) -> NoReturn:
        raise AssertionError("a pipeline with one rank sends no message")

    post_receive = send = _refuse

    def flush(self) -> None:
        """Does nothing."""


class OverlappedPassages:
    """Program of two micro-batches in one group: computation of one hides the exchange of the other."""

    def __init__(self, num_exchanges: int, device: torch.device) -> None:
        """Compiles the program as training does, for passages with a number of exchanges."""
        pair = tuple(Operation(Op.FORWARD, 0, 0, micro_batch) for micro_batch in range(2))
        schedule = Schedule(kind=DECODE_KIND, num_ranks=1, num_micro_batches=2, placement=((0,),), ranks=((pair,),))
        validate(schedule, forward_only=True)
        lanes: tuple[Lane, ...] = (*(("compute", "comm") * num_exchanges), "compute")
        self._stage = PassageStage(lanes)
        self._program = compile_rank(schedule, 0, {0: lanes}, overlapped)
        self._clock = open_clock(device)

    def run(self, passages: Sequence[Passage]) -> Tensor:
        """Returns the outputs of both micro-batches, the first one's before the other's; ND."""
        runs = [PassageRun(passage) for passage in passages]
        execute(self._program, {0: replace(self._stage, runs=runs)}, NoLinks(), self._clock)
        return torch.cat([run.output_ND for run in runs if run.output_ND is not None])


class RankDecoder(Decoder):
    """Decodes with experts that are spread over ranks, all of which take part in each pass."""

    def __init__(self, seconds: float, least_overlapped: int | None, *args: Any, **options: Any) -> None:
        """Opens a group with a timeout, in which ranks agree. All ranks build one at the same point.

        Args:
            least_overlapped: tokens of a rank from which a pass of the main model is divided into two micro-batches
                that overlap; None for never.
        """
        super().__init__(*args, **options)
        self.group = make_host_group(timedelta(seconds=seconds))
        self._least_overlapped = least_overlapped
        self.num_divided = 0  # passes of this rank
        self._overlapped = OverlappedPassages(self.num_exchanges, self.device)

    def take_turn(self, wanted: Pass, num_tokens: int = 0) -> bool:
        """Waits for the turn of a kind of pass, and runs the experts in earlier passes of other ranks.

        Returns whether the pass has two micro-batches, as it has if one rank has enough tokens.
        """
        while True:
            # The first kind that a rank wants, and the most tokens of such a rank, in one number.
            number = wanted * _MOST_TOKENS + _MOST_TOKENS - 1 - num_tokens
            turn, rest = divmod(smallest_over_ranks(number, self.group), _MOST_TOKENS)
            least = self._least_overlapped
            is_divided = least is not None and turn in (Pass.STEP, Pass.PROMPTS) and _MOST_TOKENS - 1 - rest >= least
            if turn == wanted:
                return is_divided
            if turn in (Pass.PAIRS, Pass.DRAFT):
                self.run_idle_mtp()
            elif is_divided:
                self._overlapped.run([self.idle_passage(), self.idle_passage()])
            else:
                self.run_idle_layers()

    def read_mtp(self, rows: Sequence[int], next_tokens: Sequence[Sequence[int]], state_ND: Tensor) -> None:
        """Runs the MTP module over the next pairs of prompts when it is the turn of such passes."""
        self.take_turn(Pass.PAIRS)
        super().read_mtp(rows, next_tokens, state_ND)

    def step_mtp(self, next_tokens_BS: Tensor, state_BSD: Tensor, chosen_B: Tensor) -> Tensor:
        """Runs the MTP module over new pairs when it is the turn of such passes."""
        self.take_turn(Pass.DRAFT)
        return super().step_mtp(next_tokens_BS, state_BSD, chosen_B)

    def _run_main(
        self, kind: PassKind, tokens_N: Tensor, rows: Sequence[int], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        if not self.take_turn(Pass.STEP if kind == "step" else Pass.PROMPTS, len(tokens_N)):
            return super()._run_main(kind, tokens_N, rows, counts)
        self.num_divided += 1
        hidden_ND = self._enter(kind, tokens_N, rows, counts)
        # Whole sequences, about half of the tokens. A single one leaves the second micro-batch empty.
        ends = list(accumulate(counts))
        first = 1 + min(range(len(ends)), key=lambda row: abs(2 * ends[row] - ends[-1]))
        first_ND, other_ND = hidden_ND.tensor_split((ends[first - 1],))
        passages = [self.passage(first_ND, self.views(kind, rows[:first], counts[:first])), self.idle_passage()]
        if rows[first:]:
            passages[1] = self.passage(other_ND, self.views(kind, rows[first:], counts[first:]))
        return self.final_norm(self._overlapped.run(passages))


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """The ranks that a sequence leaves and joins. Its values have no data, only shapes."""

    sequence: MovedSequence
    source: int
    target: int

    def keys(self) -> Iterator[MessageKey]:
        """Yields the key of the message with the values of each cache."""
        for cache in range(len(self.sequence.values)):
            yield MessageKey(
                kind="activation",
                direction=cache,
                stage=0,
                micro_batch=self.sequence.prompt.number,
                source=self.source,
                destination=self.target,
            )


class SequenceTransfers:
    """Links from the first ranks of a server, which read prompts, to the others, which decode."""

    def __init__(self, engine: ContinuousEngine, rank: int, num_ranks: int, num_reading: int, seconds: float) -> None:
        """Opens links with a timeout in seconds. All ranks call it at the same point."""
        self._engine = engine
        self.is_reading = rank < num_reading
        self._values: dict[int, tuple[Tensor, ...]] = {}  # of sequences that are not sent yet
        # The ranks as one pipeline, whose stages have links with each other.
        layout = Layout(ParallelismConfig(pipeline=num_ranks, data=1, expert=1), num_ranks)
        pairs = [(source, target) for source in range(num_reading) for target in range(num_reading, num_ranks)]
        self._device = next(engine.model.parameters()).device
        self._transport = PipelineTransport(layout, pairs, self._device, seconds, CollectiveLog(), ("activation",))

    @torch.no_grad()
    def depart(self) -> list[MovedSequence]:
        """Removes the sequences that have their first token, and keeps their values until they are sent.

        Sequences with a constraint stay, because its state is not sent.
        """
        if not self.is_reading:
            return []
        batch = self._engine.batch
        departures = []
        for row in [row for row in batch.rows[: batch.num_active] if row.constraint is None]:
            moved = self._engine.export_sequence(row.index)
            self._values[row.index] = moved.values
            shapes = tuple(values_LTC.to("meta") for values_LTC in moved.values)
            # Copies on the host, because a view is pickled with all of its storage, and a device has other ranks.
            states_TD = moved.states_TD.cpu().clone()
            departures.append(replace(moved, values=shapes, states_TD=states_TD))
        return departures

    def send(self, move: Move) -> None:
        """Sends the values of a sequence that has left this rank."""
        self._transport.flush()  # Their receivers have taken the values of earlier rounds.
        values = self._values.pop(move.sequence.prompt.number)
        for key, values_LTC in zip(move.keys(), values, strict=True):
            if values_LTC.numel():
                self._transport.send(key, values_LTC)

    def receive(self, move: Move) -> None:
        """Receives the values of a sequence, and continues it here."""
        values = []
        for key, shape_LTC in zip(move.keys(), move.sequence.values, strict=True):
            values_LTC = torch.empty_like(shape_LTC, device=self._device)
            if values_LTC.numel():
                values_LTC = self._transport.post_receive(key, tuple(shape_LTC.shape), shape_LTC.dtype).wait()
            values.append(values_LTC)
        states_TD = move.sequence.states_TD.to(self._device)
        self._engine.import_sequence(replace(move.sequence, values=tuple(values), states_TD=states_TD))

    def close(self) -> None:
        """Closes the links. All ranks call it at the same point."""
        self._transport.close()


@dataclass(kw_only=True, slots=True)
class Orders:
    """What ranks do at the start of a round. Requests and cancelled prompts have the number of a rank."""

    moves: list[Move] = field(default_factory=list)
    submissions: list[tuple[int, NumberedPrompt, Request]] = field(default_factory=list)
    cancelled: list[tuple[int, int]] = field(default_factory=list)
    rebalances: bool = False
    is_end: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """What a rank reports of a round."""

    news: list[SequenceUpdate]
    departures: list[MovedSequence]
    counts: Mapping[str, int]


class ServingRank:
    """One rank of a server: runs its engine in rounds with the others."""

    def __init__(
        self,
        engine: ContinuousEngine,
        placement: Placement,
        place: Callable[[Placement], None],
        transfers: SequenceTransfers,
    ) -> None:
        """Takes over an engine with a `RankDecoder`. `place` moves the experts' weights."""
        self.engine = engine
        self._transfers = transfers
        assert isinstance(engine.batch.decoder, RankDecoder)
        self._decoder = engine.batch.decoder
        self.placement = placement
        self._place = place
        self._is_ended = False

    def follow(self) -> None:
        """Takes part in rounds until rank 0 ends them, or raises LostRankError. The other ranks call it."""
        while not self._is_ended:
            self.round(Orders())

    @torch.no_grad()
    def round(self, orders: Orders) -> list[RoundReport]:
        """Runs a round with the orders of rank 0, which gets all reports; none in the last round."""
        try:
            return self._run(broadcast_first(orders, self._decoder.group))
        except RuntimeError as error:
            if not is_peer_error(error):
                raise
            raise LostRankError("ranks: one has ended or does not respond") from error

    def _run(self, orders: Orders) -> list[RoundReport]:
        group = self._decoder.group
        rank = group.rank()
        self._is_ended = orders.is_end
        if orders.is_end:
            self._transfers.close()
            return []
        if orders.rebalances:
            self._rebalance()
        for move in orders.moves:
            if move.source == rank:
                self._transfers.send(move)
            if move.target == rank:
                self._transfers.receive(move)
        for target, prompt, request in orders.submissions:
            if target == rank:
                self.engine.submit(prompt, request)
        for target, number in orders.cancelled:
            if target == rank:
                self.engine.cancel(number)
        news = self.engine.step()
        self._decoder.take_turn(Pass.NONE)
        report = RoundReport(news=news, departures=self._transfers.depart(), counts=self.engine.counts())
        return gather_on_first(report, group) or []

    def _rebalance(self) -> None:
        """Moves experts to a placement for the tokens that all ranks counted since the last one."""
        loads = expert_loads(self.engine.model)
        counts_LE = torch.stack(list(loads.values()))
        sums = sum_over_ranks(counts_LE.flatten().tolist(), self._decoder.group)  # host sync
        if not any(sums):
            return
        by_layer = dict(zip(loads, np.array(sums, np.float64).reshape(counts_LE.shape), strict=True))
        placement = self.placement.rebalanced(by_layer) if self._decoder.group.rank() == 0 else self.placement
        self.placement = broadcast_first(placement, self._decoder.group)
        self._place(self.placement)
        self.engine.forget_codes()


class RanksEngine:
    """The engine of a server on several ranks, on rank 0; the other ranks call `ServingRank.follow`.

    `step` must be called now and then even if it is idle, because the other ranks wait for a round.
    """

    def __init__(self, rank: ServingRank, prefill_ranks: int, rebalance_seconds: float | None) -> None:
        """Starts without requests.

        Args:
            prefill_ranks: number of first ranks that read all prompts, for the others to decode; 0 if all do both.
            rebalance_seconds: seconds between two placements of the experts; None keeps the first one.
        """
        self._rank = rank
        self._reports = rank.round(Orders())
        ranks = range(len(self._reports))
        self._reading = ranks[: prefill_ranks or None]
        self._decoding = ranks[prefill_ranks:]
        self._shares: dict[int, tuple[int, int]] = {}  # rank of each unfinished prompt, and the tokens that it may need
        self._orders = Orders()
        self._seconds = rebalance_seconds
        self._placed = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether no request is unfinished, and no rank has to be informed of anything."""
        return not (self._shares or self._orders.cancelled)

    def submit(self, prompt: NumberedPrompt, request: Request) -> None:
        """Queues a prompt for the rank with the fewest tokens, or raises GenerateError if it never fits."""
        self._rank.engine.check(prompt, request)
        rank = 0
        if request.constraint is not None:
            # A constraint has state that cannot be sent, not even in orders that only rank 0 follows.
            self._rank.engine.submit(prompt, request)
        else:
            rank = self._least_loaded(self._reading)
            self._orders.submissions.append((rank, prompt, request))
        self._shares[prompt.number] = (rank, len(prompt.tokens) + request.max_new_tokens)

    def cancel(self, number: int) -> None:
        """Ends the sequences of a prompt before the next pass."""
        share = self._shares.pop(number, None)
        if share is not None:
            self._orders.cancelled.append((share[0], number))

    def step(self) -> list[SequenceUpdate]:
        """Runs a round on all ranks, and returns the new tokens of all; raises LostRankError."""
        orders = self._orders
        self._orders = Orders()
        if self._seconds is not None and time.monotonic() > self._placed + self._seconds:
            orders.rebalances = True
            self._placed = time.monotonic()
        self._reports = self._rank.round(orders)
        for source, report in enumerate(self._reports):
            for sequence in report.departures:
                target = self._least_loaded(self._decoding)
                self._shares[sequence.prompt.number] = (target, self._shares[sequence.prompt.number][1])
                self._orders.moves.append(Move(sequence=sequence, source=source, target=target))
        news = [item for report in self._reports for item in report.news if item.number in self._shares]
        for item in news:
            if item.finish is not None:
                del self._shares[item.number]
        return news

    def counts(self) -> Mapping[str, int]:
        """Returns the sums over all ranks."""
        return {name: sum(report.counts[name] for report in self._reports) for name in self._reports[0].counts}

    def close(self) -> None:
        """Ends the rounds of all ranks."""
        self._rank.round(Orders(is_end=True))

    def _least_loaded(self, ranks: Sequence[int]) -> int:
        """Returns the rank with the fewest tokens that its prompts may need, the first one of several."""
        loads = dict.fromkeys(ranks, 0)
        for rank, num_tokens in self._shares.values():
            if rank in loads:
                loads[rank] += num_tokens
        return min(loads, key=loads.__getitem__)

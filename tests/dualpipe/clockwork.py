"""Simulates runs with fixed times of steps, for tests that need measured spans."""

from dualpipe.ir import Message, Schedule
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.measured import Measured, rank_spans
from dualpipe.runtime.pairing import overlapped
from dualpipe.runtime.program import Action, Lane, Program, RunKey, Step

LANES: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")
SECONDS = {"compute": 0.004, "exchange": 0.003, "start": 0.0002, "send": 0.0003, "link": 0.0005, "post": 0.00001}


def programs_of(schedule: Schedule) -> list[Program]:
    """Compiles the overlapped programs for stages of one block each."""
    return [
        compile_rank(schedule, rank, {stage: LANES for _, stage in schedule.stages_of(rank)}, overlapped)
        for rank in range(schedule.num_ranks)
    ]


def spans_of(programs: list[Program]) -> list[list[tuple[float, float]]]:
    """Returns start and end of every step; all ranks start at 0."""
    spans: list[list[tuple[float, float]]] = [[] for _ in programs]
    sent: dict[Message, float] = {}
    exchanges: dict[tuple[int, RunKey], float] = {}
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while len(spans[rank]) < len(program.steps):
                step = program.steps[len(spans[rank])]
                if step.action is Action.ACCEPT and step.message not in sent:
                    break
                start = spans[rank][-1][1] if spans[rank] else 0.0
                spans[rank].append((start, _end(rank, step, start, sent, exchanges)))
                moved = True
    assert all(len(found) == len(program.steps) for found, program in zip(spans, programs, strict=True))
    return spans


def _end(
    rank: int, step: Step, start: float, sent: dict[Message, float], exchanges: dict[tuple[int, RunKey], float]
) -> float:
    match step.action:
        case Action.ACCEPT:
            assert step.message is not None
            return max(start, sent[step.message] + SECONDS["link"])
        case Action.SEND:
            assert step.message is not None
            sent[step.message] = start + SECONDS["send"]
            return sent[step.message]
        case Action.FORWARD | Action.BACKWARD if LANES[step.phase] == "comm":
            exchanges[rank, step.run] = start + SECONDS["exchange"]
            return start + SECONDS["start"]
        case Action.WAIT:
            return max(start, exchanges.pop((rank, step.run)))
        case Action.FORWARD | Action.BACKWARD | Action.WEIGHT:
            return start + SECONDS["compute"]
        case _:
            return start + SECONDS["post"]


def measured_run(schedule: Schedule, origin_seconds: float = 100.0) -> Measured:
    """Returns the spans of the whole pipeline, which starts at `origin_seconds` on the shared clock."""
    programs = programs_of(schedule)
    return Measured(
        ranks=tuple(
            rank_spans(schedule.ranks[rank], program, spans, origin_seconds)
            for rank, (program, spans) in enumerate(zip(programs, spans_of(programs), strict=True))
        )
    )

"""Lowers a schedule to a rank's program: phases on two lanes with waits and transfers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import assert_never

from dualpipe.ir import Group, Link, Message, Op, Operation, Schedule, Value, message_of, value_made, value_needed
from dualpipe.passes import order_members
from dualpipe.runtime.pairing import Atom
from dualpipe.runtime.program import Action, Lane, Program, RunKey, Step

Pairing = Callable[[Sequence[Sequence[Atom]]], list[Atom]]


def compile_rank(schedule: Schedule, rank: int, lanes: Mapping[int, Sequence[Lane]], pairing: Pairing) -> Program:
    """Compiles the program of one rank. A forward-only schedule gives a forward-only program.

    Args:
        lanes: lane of each phase, for every stage that the rank holds.
        pairing: function that interleaves the operations of a group (`pairing.overlapped` or `pairing.sequential`).
    """
    groups = schedule.ranks[rank]
    is_training = any(op.kind is not Op.FORWARD for group in groups for op in group)
    offloaded = {run_key(op) for group in groups for op in group if op.kind is Op.OFFLOAD}
    # Messages of the groups that need any, in order. A copy needs none.
    posts = _posts([_receives(schedule, group) for group in groups if not group[0].kind.is_copy], schedule.link_depth)
    steps: list[Step] = []
    orders: dict[tuple[object, ...], list[int]] = {}
    index = 0
    for group in groups:
        if group[0].kind.is_copy:
            steps.append(_copy(group[0]))
            continue
        steps += posts[index]
        index += 1
        ops = order_members(group)
        members = [
            _atoms(schedule, op, lanes[op.stage], is_training=is_training, is_offloaded=run_key(op) in offloaded)
            for op in ops
        ]
        # Groups that differ only in their micro-batches are interleaved in the same way.
        shape = tuple((op.kind, op.direction, op.stage, run_key(op) in offloaded) for op in ops)
        if shape not in orders:
            orders[shape] = _order(members, pairing)
        atoms = [atom for member in members for atom in member]
        steps += [step for position in orders[shape] for step in atoms[position].steps]
    return Program(rank, tuple(steps))


def _order(members: Sequence[Sequence[Atom]], pairing: Pairing) -> list[int]:
    places = {id(atom): index for index, atom in enumerate(atom for member in members for atom in member)}
    return [places[id(atom)] for atom in pairing(members)]


def _posts(receives: Sequence[Sequence[tuple[Operation, Message]]], link_depth: int) -> list[list[Step]]:
    """Returns the receives to post before each group, given those that each group needs.

    They are posted one group ahead, so that a message is sent during the group before the one that needs it. On each
    link, `link_depth - 1` receives after those of a group are posted before it too.
    """
    posts: list[list[Step]] = [[] for _ in receives]
    needed_at: dict[Link, list[int]] = {}  # groups that need the messages of a link, in order
    for index, group in enumerate(receives):
        for op, message in group:
            groups = needed_at.setdefault(message.link, [])
            groups.append(index)
            earliest = groups[-link_depth] if len(groups) >= link_depth else 0
            posts[max(0, min(index - 1, earliest))].append(Step(Action.RECEIVE, run_key(op), message=message))
    return posts


def _copy(op: Operation) -> Step:
    return Step(Action.RELEASE if op.kind is Op.OFFLOAD else Action.RELOAD, run_key(op))


def run_key(op: Operation) -> RunKey:
    """Returns the key of the run to which an operation belongs."""
    return RunKey(op.direction, op.stage, op.micro_batch)


def _receives(schedule: Schedule, group: Group) -> list[tuple[Operation, Message]]:
    incoming = ((op, _incoming(schedule, op)) for op in group)
    return [(op, message) for op, message in incoming if message is not None and message.source != message.destination]


def _incoming(schedule: Schedule, op: Operation) -> Message | None:
    value = value_needed(schedule, op)
    return None if value is None else _carrier(schedule, value, op)


def _outgoing(schedule: Schedule, op: Operation) -> Message | None:
    value = value_made(schedule, op)
    return None if value is None else _carrier(schedule, value, op)


def _carrier(schedule: Schedule, value: Value, op: Operation) -> Message:
    """Returns the message with a value that `op` makes or needs; within one rank, a message to itself."""
    message = message_of(schedule, value)
    if message is not None:
        return message
    rank = schedule.rank_of(op.direction, op.stage)
    return Message(
        kind=value.kind,
        direction=value.direction,
        stage=value.stage,
        micro_batch=value.micro_batch,
        source=rank,
        destination=rank,
    )


def _atoms(
    schedule: Schedule, op: Operation, lanes: Sequence[Lane], *, is_training: bool, is_offloaded: bool
) -> list[Atom]:
    """Returns the atoms of one operation, with its transfers and the end of the run after the last one.

    The forward of an offloaded micro-batch then starts its copy, and the backward first waits for the copy back.
    """
    phases = range(len(lanes))
    match op.kind:
        case Op.FORWARD:
            atoms = _passage(op, Action.FORWARD, phases, lanes)
        case Op.BACKWARD | Op.BACKWARD_INPUT:
            atoms = _passage(op, Action.BACKWARD, reversed(phases), lanes)
        case Op.BACKWARD_WEIGHT:
            atoms = [_weight(op, phase) for phase in reversed(phases) if lanes[phase] == "compute"]
        case Op.OFFLOAD | Op.RELOAD:
            raise AssertionError(f"{op} has no phases")
        case _ as other:
            assert_never(other)
    atoms = _with_transfers(op, atoms, _incoming(schedule, op), _outgoing(schedule, op))
    if is_offloaded and op.kind is Op.FORWARD:
        atoms[-1] = _extended(atoms[-1], Step(Action.OFFLOAD, run_key(op)))
    if is_offloaded and op.kind in (Op.BACKWARD, Op.BACKWARD_INPUT):
        atoms[0] = Atom(atoms[0].lane, (Step(Action.RESTORE, run_key(op)), *atoms[0].steps), atoms[0].needs_exchange)
    if op.kind is Op.BACKWARD:
        atoms = _with_weights(op, atoms, lanes)
    if op.kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT) or not is_training:
        atoms[-1] = _extended(atoms[-1], Step(Action.FINISH, run_key(op)))
    return atoms


def _passage(op: Operation, action: Action, order: Iterable[int], lanes: Sequence[Lane]) -> list[Atom]:
    """Returns the phases in order. The phase after an exchange, or a final atom, waits for the exchange."""
    atoms: list[Atom] = []
    pending = False
    run = run_key(op)
    for phase in order:
        step = Step(action, run, phase)
        steps = (Step(Action.WAIT, run), step) if pending else (step,)
        atoms.append(Atom(lanes[phase], steps, pending))
        pending = lanes[phase] == "comm"
    if pending:
        atoms.append(Atom("compute", (Step(Action.WAIT, run),), needs_exchange=True))
    return atoms


def _with_transfers(op: Operation, atoms: list[Atom], incoming: Message | None, outgoing: Message | None) -> list[Atom]:
    atoms = list(atoms)
    if incoming is not None:
        first = atoms[0]
        accept = Step(Action.ACCEPT, run_key(op), message=incoming)
        atoms[0] = Atom(first.lane, (accept, *first.steps), first.needs_exchange)
    if outgoing is not None:
        atoms[-1] = _extended(atoms[-1], Step(Action.SEND, run_key(op), message=outgoing))
    return atoms


def _with_weights(op: Operation, atoms: list[Atom], lanes: Sequence[Lane]) -> list[Atom]:
    """Inserts the weight gradients of each computation after the start of the exchange that they hide."""
    ordered: list[Atom] = []
    deferred: list[Atom] = []
    for atom in atoms:
        if atom.lane == "comm":
            ordered += [atom, *deferred]
            deferred = []
            continue
        ordered += [*deferred, atom]
        deferred = [_weight(op, step.phase) for step in atom.steps if step.action is Action.BACKWARD]
    return ordered + deferred


def _weight(op: Operation, phase: int) -> Atom:
    return Atom("compute", (Step(Action.WEIGHT, run_key(op), phase),), needs_exchange=False)


def _extended(atom: Atom, step: Step) -> Atom:
    return Atom(atom.lane, (*atom.steps, step), atom.needs_exchange)

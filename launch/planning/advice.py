"""Computes hardware advice for a run: every wish is planned as a what-if."""

from launch.help.command import user_errors
from launch.planning.request import PlanRequest
from launch.planning.what_if import changed_run, plan_what_if
from train.planner.advice.advice import AdviceRow, HardwareAdvice, sorted_rows
from train.planner.advice.balance import link_balance
from train.planner.advice.wishes import UnknownWish, wishes
from train.planner.job_plan import JobPlan, require_time


def advise_hardware(request: PlanRequest, base: JobPlan) -> HardwareAdvice:
    """Returns what better hardware would gain for a run.

    A changed run keeps the order and the cut of the run if they apply, so that the gain is that of the hardware alone.

    Raises:
        ConfigError: the time of the run is unknown.
    """
    require_time(base)
    rows, unknown = list[AdviceRow](), list[UnknownWish]()
    for wish in wishes(request.config, request.planner.rates):
        if isinstance(wish, UnknownWish):
            unknown.append(wish)
            continue
        try:
            run = changed_run(request, wish.change)
            what_if = plan_what_if(request, base, run, keeps_order=True)
        except user_errors() as error:
            unknown.append(UnknownWish(name=wish.name, needs=f"another run; {wish.change} is refused: {error}"))
            continue
        rows.append(AdviceRow(wish=wish, what_if=what_if))
    balance = link_balance(base.config, request.planner.rates)
    return HardwareAdvice(rows=sorted_rows(rows), unknown=tuple(unknown), balance=balance)

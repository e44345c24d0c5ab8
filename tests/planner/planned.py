"""Plans that several tests share."""

from functools import cache

from launch.plan_request import PlanRequest, read_request
from planner.job_plan import JobPlan, plan_job

PUBLISHED = ("experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even")
"""The published run, in the published order, with whole layers cut evenly."""
SMALL = (
    "model=v2_lite_16b",
    "cluster=h800",
    "precision=bf16",
    "parallelism=eight_ranks",
    "batch.sequence_length_tokens=2048",
    "batch.global_sequences=32",
    "validation.sequences=0",
    "task.steps=1000",
)
"""A run on eight ranks whose plan takes little time."""


@cache
def request_of(*overrides: str) -> PlanRequest:
    return read_request(overrides)


@cache
def plan_of(*overrides: str) -> JobPlan:
    request = request_of(*overrides)
    return plan_job(request.config, request.planner)

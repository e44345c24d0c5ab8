"""Checks that a token over the cap of nodes ends a step on every rank of its expert group."""

from dataclasses import replace

import torch
from torch import distributed as dist

from comm.config import AllToAllDispatchConfig, TwoHopDispatchConfig
from comm.dispatch.node_cap import NodeCapError
from comm.dispatch.registry import TokenSizes
from comm.layout import Layout
from verify.checks import Failure, Findings, Verification
from verify.runs import opened_world

_CAUSE = "this rank does not compare the numbers of tokens over the cap of all ranks, and would wait for the others"


def check_cap(verification: Verification) -> Findings:
    """Dispatches a token over the cap from the last rank of each expert group, with each rank as a node."""
    config = next((trial.config for trial in verification.trials if trial.axis == "expert"), None)
    if config is None or not isinstance(config.dispatch, AllToAllDispatchConfig | TwoHopDispatchConfig):
        return Findings(summary="not looked at: no all_to_all or two_hop between ranks")
    with opened_world(verification, config) as (world, _):
        members = dist.get_process_group_ranks(world.groups.expert)
        own, num_experts = members.index(dist.get_rank()), config.model.num_routed_experts
        ids_TK = torch.tensor([[own * num_experts // len(members), -1]], device=world.device)
        if own == len(members) - 1:
            ids_TK = torch.tensor([[0, num_experts - 1]], device=world.device)
        rows_TD = torch.ones(1, config.model.hidden_size, device=world.device)
        weights_TK = torch.ones(1, 2, device=world.device)
        tokens = TokenSizes(max_tokens=1, hidden_size=config.model.hidden_size, num_choices=2)
        nodes = replace(world, layout=Layout(config.parallelism, 1))  # each rank is one
        free, capped = (
            nodes.open_dispatcher(
                replace(config.dispatch, payload="full", node_cap="verify", max_nodes=most),
                num_experts,
                world.observers(),
                tokens,
            )
            for most in (len(members), 1)
        )
        free_handle = free.plan(ids_TK)
        free.dispatch(rows_TD, weights_TK, free_handle).wait()
        message = ""
        try:
            capped.dispatch(rows_TD, weights_TK, capped.plan(ids_TK)).wait()
        except NodeCapError as error:
            message = str(error)
            # A rank that does not raise sends its rows, so this one sends the same rows.
            free.dispatch(rows_TD, weights_TK, free_handle).wait()
        capped.close()
        free.close()
    culprit = f"rank {members[-1]}"
    failures = []
    if f"{culprit}:" not in message and f"{culprit} has" not in message:
        difference = f"a token of {culprit} over dispatch.max_nodes " + (
            f"is reported as: {message}" if message else "raises no error"
        )
        failures.append(Failure(rank=dist.get_rank(), subject="node cap", difference=difference, cause=_CAUSE))
    return Findings(
        summary="a token over the cap of nodes raises an error on all ranks that names its rank", failures=failures
    )

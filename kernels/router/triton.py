"""Router in one kernel each way, in Triton; see kernels/router/reference.py.

Both are bound by launches: a row of scores is read and written once. Choices equal the reference's, ties included: the
sigmoid is computed in float64 and rounded once, the bias is one addition, and of equal scores the lower place wins.

    kernel          grid            tile                     accumulator                          rounding
    route           T / block_rows  rows x E, groups and     sum of the chosen in float32; loads  scores: once, from
                                    their experts padded to  by atomic additions of integers      float64; weights: to
                                    powers of two                                                 nearest even
    route_backward  T / block_rows  rows x E                 sums over K in float32               to nearest even
"""

# Shape legend: as in the reference; P places of a padded row: place g S + s is expert s of group g, for S a power of
# two of at least E / G.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_kernel
from kernels.operation import check_operand
from kernels.router.reference import SMALLEST_SUM, Chosen, RouteLimits

EPSILON = tl.constexpr(SMALLEST_SUM)


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid(logits: tl.tensor) -> tl.tensor:
    """Returns the float32 number nearest to the sigmoid."""
    return (1 / (1 + tl.exp(-logits.to(tl.float64)))).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _in_best_groups(
    biased: tl.tensor, NUM_LIMITED: tl.constexpr, PER_GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
) -> tl.tensor:
    """Returns the mask of the places in each row's best groups, rows x P; padding is -inf."""
    SIZE: tl.constexpr = biased.shape[1] // GROUPS
    values = tl.reshape(biased, (ROWS, GROUPS, SIZE))
    # A group's score: its best expert, and again and again the best of the others.
    totals = tl.max(values, axis=2)
    for _ in tl.static_range(PER_GROUP - 1):
        first = tl.argmax(values, axis=2, tie_break_left=True)
        values = tl.where(tl.arange(0, SIZE)[None, None, :] == first[:, :, None], float("-inf"), values)
        totals += tl.max(values, axis=2)
    # One group after the other; its score is removed once it is chosen.
    group = tl.arange(0, GROUPS)[None, :]
    is_best = group < 0
    for _ in tl.static_range(NUM_LIMITED):
        best = tl.argmax(totals, axis=1, tie_break_left=True)[:, None] == group
        is_best = is_best | best
        totals = tl.where(best, float("-inf"), totals)
    return tl.reshape(tl.broadcast_to(is_best[:, :, None], (ROWS, GROUPS, SIZE)), (ROWS, GROUPS * SIZE))


@triton.jit(do_not_specialize=["num_rows", "factor"])  # type: ignore[untyped-decorator]
def route_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    load: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    scores: tl.tensor,
    num_rows: tl.tensor,
    logits_stride: tl.tensor,
    factor: tl.tensor,
    IS_FORCED: tl.constexpr,
    HAS_LOAD: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_LIMITED: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Routes BLOCK_ROWS tokens; IS_FORCED: `ids` has their experts."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    # Experts at the places of a row, rows x P.
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    place = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)[None, :]
    expert = place // BLOCK_SIZE * GROUP_SIZE + place % BLOCK_SIZE
    exists = (place % BLOCK_SIZE < GROUP_SIZE) & (place // BLOCK_SIZE < NUM_GROUPS)
    inside = (row < num_rows) & exists
    score = _sigmoid(tl.load(logits + row * logits_stride + expert, mask=inside, other=0.0))
    tl.store(scores + row * NUM_EXPERTS + expert, score, mask=inside)
    # Chosen experts and their scores, rows x K.
    choice = tl.arange(0, BLOCK_CHOSEN)[None, :]
    is_choice = (row < num_rows) & (choice < NUM_CHOSEN)
    if IS_FORCED:
        chosen = tl.load(ids + row * NUM_CHOSEN + choice, mask=is_choice, other=0)
        logit = tl.load(logits + row * logits_stride + chosen, mask=is_choice, other=0.0)
        chosen_score = tl.where(is_choice, _sigmoid(logit), 0.0)
    else:
        biased = score + tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)
        # As in torch's topk, a NaN is the largest; choices stay distinct.
        biased = tl.where(biased == biased, biased, float("inf"))
        biased = tl.where(exists, biased, float("-inf"))
        if NUM_LIMITED < NUM_GROUPS:
            is_allowed = _in_best_groups(biased, NUM_LIMITED, PER_GROUP, BLOCK_ROWS, BLOCK_GROUPS)
            biased = tl.where(is_allowed, biased, float("-inf"))
        chosen = tl.zeros((BLOCK_ROWS, BLOCK_CHOSEN), tl.int64)
        chosen_score = tl.zeros((BLOCK_ROWS, BLOCK_CHOSEN), tl.float32)
        for number in tl.static_range(NUM_CHOSEN):
            is_best = tl.argmax(biased, axis=1, tie_break_left=True)[:, None] == place
            best = tl.sum(tl.where(is_best, expert, 0), axis=1)[:, None].to(tl.int64)
            chosen = tl.where(choice == number, best, chosen)
            best_score = tl.sum(tl.where(is_best, score, 0.0), axis=1)[:, None]
            chosen_score = tl.where(choice == number, best_score, chosen_score)
            biased = tl.where(is_best, float("-inf"), biased)
        tl.store(ids + row * NUM_CHOSEN + choice, chosen, mask=is_choice)
    if HAS_LOAD:
        tl.atomic_add(load + chosen, tl.full(chosen.shape, 1, tl.int64), mask=is_choice, sem="relaxed")
    total = tl.sum(chosen_score, axis=1)[:, None] + EPSILON
    tl.store(
        weights + row * NUM_CHOSEN + choice,
        tl.div_rn(chosen_score, tl.broadcast_to(total, chosen_score.shape)) * factor,
        mask=is_choice,
    )


@triton.jit(do_not_specialize=["num_rows", "factor"])  # type: ignore[untyped-decorator]
def route_backward_kernel(
    grad_weights: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    scores: tl.tensor,
    grad_scores: tl.tensor,
    grad_logits: tl.tensor,
    num_rows: tl.tensor,
    factor: tl.tensor,
    HAS_GRAD_SCORES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
) -> None:
    """Computes the gradient of the logits of BLOCK_ROWS tokens."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    inside = (row < num_rows) & (expert < NUM_EXPERTS)
    score = tl.load(scores + row * NUM_EXPERTS + expert, mask=inside, other=0.0)
    choice = tl.arange(0, BLOCK_CHOSEN)[None, :]
    is_choice = (row < num_rows) & (choice < NUM_CHOSEN)
    places = row * NUM_CHOSEN + choice
    chosen = tl.load(ids + places, mask=is_choice, other=-1)
    grad_weight = tl.load(grad_weights + places, mask=is_choice, other=0.0)
    # A chosen score's slope is by how much its weight's exceeds the mean, divided by the sum of the chosen.
    chosen_score = tl.load(scores + row * NUM_EXPERTS + chosen, mask=is_choice, other=0.0)
    total = tl.sum(chosen_score, axis=1)[:, None] + EPSILON
    weight = tl.load(weights + places, mask=is_choice, other=0.0)
    mean = tl.sum(grad_weight * weight, axis=1)[:, None]
    slope = tl.div_rn(grad_weight * factor - mean, tl.broadcast_to(total, grad_weight.shape))
    grad = tl.zeros((BLOCK_ROWS, BLOCK_EXPERTS), tl.float32)
    if HAS_GRAD_SCORES:
        grad = tl.load(grad_scores + row * NUM_EXPERTS + expert, mask=inside, other=0.0)
    # An expert is chosen at most once, so each slope has a place.
    for number in tl.static_range(NUM_CHOSEN):
        is_chosen = tl.sum(tl.where(choice == number, chosen, 0), axis=1)[:, None] == expert
        grad += tl.where(is_chosen, tl.sum(tl.where(choice == number, slope, 0.0), axis=1)[:, None], 0.0)
    tl.store(grad_logits + row * NUM_EXPERTS + expert, grad * (score * (1 - score)), mask=inside)


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    limits: RouteLimits,
    load_E: Tensor | None = None,
    ids_TK: Tensor | None = None,
    *,
    block_rows: int = 4,
    num_warps: int = 4,
) -> Chosen:
    """Implements `reference.route` for float32; `block_rows` rows per program."""
    num_rows, num_experts = logits_TE.shape
    check_operand("route: bias_E", bias_E, (num_experts,), logits_TE.device)
    logits_TE = logits_TE.contiguous()
    is_forced = ids_TK is not None
    shape = (num_rows, limits.num_chosen)
    made_TK = logits_TE.new_empty(shape, dtype=torch.int64) if ids_TK is None else ids_TK.contiguous()
    check_operand("route: ids_TK", made_TK, shape, logits_TE.device, torch.int64)
    chosen = Chosen(made_TK, logits_TE.new_empty(shape), torch.empty_like(logits_TE))
    # Without a limit, all experts are one group.
    num_groups = limits.num_groups if limits.num_limited_groups < limits.num_groups else 1
    launch_kernel(
        route_kernel,
        (logits_TE, bias_E, load_E, *chosen),
        (num_rows,),
        (block_rows,),
        factor=float(limits.factor),
        IS_FORCED=is_forced,
        HAS_LOAD=load_E is not None,
        NUM_EXPERTS=num_experts,
        NUM_CHOSEN=limits.num_chosen,
        NUM_GROUPS=num_groups,
        NUM_LIMITED=min(limits.num_limited_groups, num_groups),
        PER_GROUP=limits.num_per_group(num_experts),
        BLOCK_CHOSEN=triton.next_power_of_2(limits.num_chosen),
        BLOCK_GROUPS=triton.next_power_of_2(num_groups),
        BLOCK_SIZE=triton.next_power_of_2(num_experts // num_groups),
        num_warps=num_warps,
    )
    return chosen


def route_backward(
    grad_weights_TK: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor,
    grad_scores_TE: Tensor | None,
    limits: RouteLimits,
    *,
    block_rows: int = 4,
    num_warps: int = 4,
) -> Tensor:
    """Implements `reference.route_backward`; `block_rows` rows per program."""
    num_rows, num_experts = scores_TE.shape
    num_chosen = ids_TK.shape[1]
    check_operand("route_backward: grad_weights_TK", grad_weights_TK, (num_rows, num_chosen), scores_TE.device)
    grad_logits_TE = torch.empty_like(scores_TE)
    grad_scores_TE = None if grad_scores_TE is None else grad_scores_TE.contiguous()
    launch_kernel(
        route_backward_kernel,
        (grad_weights_TK.contiguous(), ids_TK, weights_TK, scores_TE, grad_scores_TE, grad_logits_TE),
        (num_rows,),
        (block_rows,),
        factor=float(limits.factor),
        HAS_GRAD_SCORES=grad_scores_TE is not None,
        NUM_EXPERTS=num_experts,
        NUM_CHOSEN=num_chosen,
        BLOCK_CHOSEN=triton.next_power_of_2(num_chosen),
        BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
        num_warps=num_warps,
    )
    return grad_logits_TE

"""The policy-gradient objective against its definition by loops over answers, under autograd on whole logits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from model.objective import CrossEntropy, MicroBatch, OutputHead, TaskLoss
from model.objectives.policy import PolicyGradient
from model.objectives.policy_loss import PolicyLossConfig
from tests.answers import GRPO, draw_answers, drawn, plain_answers, plain_loss
from train.config.decode import decode
from train.tasks.next_token import to_micro_batch

HIDDEN, VOCAB, LENGTH, LONGEST = 5, 11, 40, 6
ROWS = (4, 2, 0)
VARIANTS = {
    path.stem: decode(PolicyLossConfig, yaml.safe_load(path.read_text("utf-8")))
    for path in sorted((Path(__file__).parents[2] / "conf" / "task" / "loss").glob("*.yaml"))
}
FORMS = {
    **VARIANTS,
    "two-sided": replace(GRPO, largest_ratio=1.5),
    "open": replace(GRPO, clip_low=None, clip_high=None),
    "truncated": replace(GRPO, sampler_ratio_cap=1.3),
    "masked product": replace(GRPO, ratio="sequence_product", off_policy_limit=0.0, sampler_ratio_cap=1.1),
    "weighted mean": replace(GRPO, surrogate="weighted", ratio="sequence_mean", largest_ratio=1.1),
}


def micro_batch(**extras: Tensor) -> MicroBatch:
    batch = draw_answers(0, ROWS, LENGTH, VOCAB)
    made = to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=True, weights_BT=batch.extras["weights"])
    return replace(made, extras={**made.extras, **extras})


def objective_of(form: PolicyLossConfig, temperature: float = 1.0) -> PolicyGradient:
    """The objective of `micro_batch` alone."""
    answers = sum(ROWS)
    tokens = int(micro_batch().extras["weights"].sum())
    return PolicyGradient(
        targets=CrossEntropy(factors=(1.0,), balance=0.0),
        form=form,
        factor=1 / (tokens if form.normalizer == "tokens" else answers),
        max_new_tokens=LONGEST,
        temperature=temperature,
    )


def whole_log_probs(hidden: Tensor, weight: Tensor, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probabilities from whole logits, among the kept tokens if the batch has them."""
    logits = hidden @ weight.t() / temperature
    kept = batch.extras.get("kept_ids")
    if kept is not None:
        is_kept = (kept[..., None] == torch.arange(len(weight))).any(2) | (kept < 0).all(2)[..., None]
        logits = logits.masked_fill(~is_kept, float("-inf"))
    return torch.log_softmax(logits, -1).gather(2, batch.targets_BT[0].clamp_min(0)[..., None])[..., 0]


def gradients(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """Gradients in the states and the head's matrix, and the loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad, float(value.detach())


def apply(objective: PolicyGradient, hidden: Tensor, weight: Tensor, batch: MicroBatch) -> TaskLoss:
    return objective.loss(hidden, OutputHead(0, weight), batch, None)


def near_policy(hidden: Tensor, weight: Tensor, batch: MicroBatch, temperature: float = 1.0) -> dict[str, Tensor]:
    """Log-probabilities of three other models, near those of the policy: ratios on both sides of every clip."""
    own = whole_log_probs(hidden, weight, batch, temperature).detach()
    names, scales = ("old_log_probs", "reference_log_probs", "sampler_log_probs"), (0.4, 0.5, 0.3)
    noise = (drawn(30 + place, *own.shape) for place in range(3))
    return {name: own + scale * each for name, scale, each in zip(names, scales, noise, strict=True)}


@pytest.mark.parametrize(("has_old", "temperature"), [(True, 1.0), (False, 1.0), (True, 0.6)])
@pytest.mark.parametrize("name", FORMS)
def test_policy_loss_is_its_definition_and_its_gradient_that_of_autograd(
    name: str, has_old: bool, temperature: float
) -> None:
    form = replace(FORMS[name], kl_weight=FORMS[name].kl_weight * 10)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    others = near_policy(hidden, weight, micro_batch(), temperature)
    batch = micro_batch(**{name: each for name, each in others.items() if has_old or name != "old_log_probs"})

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = whole_log_probs(hidden, weight, batch, temperature)
        return plain_loss(form, list(plain_answers(log_probs, dict(batch.extras))), LONGEST)

    found = gradients(lambda rows, head: apply(objective_of(form, temperature), rows, head, batch).loss, hidden, weight)
    expected = gradients(formula, hidden, weight)
    assert found[2] == pytest.approx(expected[2], rel=1e-12, abs=1e-14)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert float(theirs.abs().max()) > 1e-3
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        unrecorded = apply(objective_of(form, temperature), hidden, weight, batch)
    assert float(unrecorded.loss) == pytest.approx(expected[2], rel=1e-12, abs=1e-14)

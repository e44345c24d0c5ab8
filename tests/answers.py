"""Sampled answers for tests: packed batches drawn from a seed, and the loss of their tokens by loops under autograd."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from base.decode import decode
from data.loader import Batch
from model.config import PolicyLossConfig

GRPO = PolicyLossConfig(
    advantage="standardized",
    ratio="token",
    surrogate="clipped",
    clip_low=0.2,
    clip_high=0.2,
    largest_ratio=None,
    normalizer="answers",
    kl="none",
    kl_weight=0.0,
    off_policy_limit=None,
    sampler_ratio_cap=None,
)
VARIANTS = {
    path.stem: decode(PolicyLossConfig, yaml.safe_load(path.read_text("utf-8")))
    for path in sorted((Path(__file__).parents[1] / "conf" / "task" / "loss").glob("*.yaml"))
}
"""The losses that `task/loss=` chooses."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_answers(seed: int, rows: tuple[int, ...], length: int, vocab_size: int) -> Batch:
    """Packs drawn prompts with answers into sequences; each answer has an advantage, and log-probabilities are 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), length)
    tokens, positions = torch.full(shape, 2), torch.full(shape, -1)
    extras = {
        "weights": torch.zeros(shape, dtype=torch.int16),
        "answer": torch.zeros(shape, dtype=torch.int64),
        "advantage": torch.zeros(shape, dtype=torch.float64),
        "sampler_log_probs": torch.zeros(shape, dtype=torch.float64),
    }
    for row, number in enumerate(rows):
        end = 0
        for answer in range(1, number + 1):
            prompt, new = torch.randint(1, 6, (2,), generator=generator).tolist()
            piece = slice(end, end + prompt + new)
            assert piece.stop <= length, f"row {row} has {piece.stop} tokens, of at most {length}"
            tokens[row, piece] = torch.randint(3, vocab_size, (prompt + new,), generator=generator)
            positions[row, piece] = torch.arange(prompt + new)
            predicts = slice(end + prompt - 1, piece.stop - 1)
            extras["weights"][row, predicts] = 1
            extras["answer"][row, predicts] = answer
            extras["advantage"][row, predicts] = torch.randn((), generator=generator, dtype=torch.float64)
            end = piece.stop
    return Batch(tokens_BT=tokens, positions_BT=positions, pad_id=2, extras=extras)


@dataclass(frozen=True, kw_only=True, slots=True)
class OneAnswer:
    """Values of the tokens of one answer."""

    log_probs: Tensor
    sampler: Tensor
    old: Tensor | None
    reference: Tensor | None
    advantage: Tensor


def plain_answers(log_probs_BT: Tensor, extras: dict[str, Tensor]) -> Iterator[OneAnswer]:
    for row, numbers in enumerate(extras["answer"]):
        for number in range(1, int(numbers.max()) + 1):
            place = (row, numbers == number)
            old, reference = (extras.get(name) for name in ("old_log_probs", "reference_log_probs"))
            yield OneAnswer(
                log_probs=log_probs_BT[place],
                sampler=extras["sampler_log_probs"][place],
                old=None if old is None else old[place],
                reference=None if reference is None else reference[place],
                advantage=extras["advantage"][place][0],
            )


def plain_loss(form: PolicyLossConfig, answers: list[OneAnswer], max_new_tokens: int) -> Tensor:
    """Computes the loss of answers as its definition says, for autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for answer in answers:
        terms = -_plain_surrogate(form, answer)
        if answer.reference is not None:
            terms = terms + form.kl_weight * _plain_kl(form, answer)
        divisor = {"answers": len(terms), "length": max_new_tokens}.get(form.normalizer, 1)
        total = total + terms.sum() / divisor
    tokens = sum(len(answer.log_probs) for answer in answers)
    return total / (tokens if form.normalizer == "tokens" else len(answers))


def _plain_surrogate(form: PolicyLossConfig, answer: OneAnswer) -> Tensor:
    log_probs, length = answer.log_probs, len(answer.log_probs)
    old = log_probs.detach() if answer.old is None else answer.old
    ratio, share = _plain_ratio(form, log_probs - old), 1.0
    if form.ratio == "sequence_product" and form.surrogate == "clipped":
        share = 1 / length
    if form.largest_ratio is not None:
        ratio = ratio.clamp(max=form.largest_ratio)
    if form.surrogate == "weighted":
        terms = ratio.detach() * answer.advantage * log_probs
    else:
        clipped = ratio
        if form.clip_low is not None:
            clipped = clipped.clamp(min=1 - form.clip_low)
        if form.clip_high is not None:
            clipped = clipped.clamp(max=1 + form.clip_high)
        terms = share * torch.minimum(ratio * answer.advantage, clipped * answer.advantage)
    if form.sampler_ratio_cap is not None:
        terms = terms * (old.detach() - answer.sampler).exp().clamp(max=form.sampler_ratio_cap)
    is_far = float((answer.sampler - log_probs.detach()).mean()) > (form.off_policy_limit or 0)
    return terms * 0 if form.off_policy_limit is not None and is_far and answer.advantage < 0 else terms


def _plain_ratio(form: PolicyLossConfig, log_ratio: Tensor) -> Tensor:
    sequence: dict[str, Callable[[Tensor], Tensor]] = {"sequence_mean": torch.mean, "sequence_product": torch.sum}
    if form.ratio in sequence:
        return sequence[form.ratio](log_ratio).exp().expand(len(log_ratio))
    return log_ratio.exp()


def _plain_kl(form: PolicyLossConfig, answer: OneAnswer) -> Tensor:
    assert answer.reference is not None
    log_q = answer.reference - answer.log_probs
    old = answer.log_probs.detach() if answer.old is None else answer.old
    if form.kl == "forward_answer":
        log_q = log_q.sum()
        return ((log_q.exp() - log_q - 1) / len(answer.log_probs)).expand(len(answer.log_probs))
    third = log_q.exp() - log_q - 1
    match form.kl:
        case "reverse":
            return (answer.log_probs - old).exp() * third
        case "reverse_squared":
            return log_q.square() / 2
        case "forward":
            return third
        case "none":
            return 0 * third

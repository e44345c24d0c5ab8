"""Tests of penalties with numbers computed by hand, and that drafts do not change what they do."""

import pytest
import torch

from infer.config import Sampling, Speculative
from infer.generate import generate
from infer.sample import TokenHistory, penalize
from tests.infer.models import make_foresighted

CPU = torch.device("cpu")


def test_penalties_change_logits_of_tokens_that_occurred() -> None:
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    history = TokenHistory.of([0, 1, 1], [1, 3, 3], 5, CPU)
    logits = torch.tensor([[4.0, -4.0, 1.0, 3.0, -1.0]])
    expected = [4 / 2, -4 * 2 - 0.5 - 0.25, 1, 3 / 2 - 2 * 0.5 - 0.25, -1]
    assert penalize(logits, history, sampling).tolist() == [expected]
    after = penalize(logits, history.after(torch.tensor([4])), sampling)
    assert after.tolist() == [[*expected[:4], -1 * 2 - 0.5 - 0.25]]


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_follows_the_penalized_logits(speculative: Speculative, batch_size: int) -> None:
    model, prompts = make_foresighted(), [[5, 9], [7, 7, 7], [1, 2, 3, 4]]
    sampling = Sampling(repetition_penalty=0.8, presence_penalty=-3.0, frequency_penalty=1.5)
    made = generate(
        model, prompts, max_new_tokens=12, sampling=sampling, speculative=speculative, batch_size=batch_size
    )
    plain = generate(model, prompts, max_new_tokens=12, speculative=speculative)
    assert made.continuations != plain.continuations
    for prompt, continuation in zip(prompts, made.continuations, strict=True):
        tokens = list(continuation.tokens)
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
        for at, token in enumerate(tokens):
            history = TokenHistory.of(prompt, tokens[:at], logits_TV.shape[1], CPU)
            assert int(penalize(logits_TV[at : at + 1], history, sampling).argmax()) == token, at

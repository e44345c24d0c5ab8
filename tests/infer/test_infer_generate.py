"""Greedy continuation is the argmax, token by token."""

from dataclasses import replace

import pytest
import torch

from comm.local import LocalDispatcher
from infer.generate import continue_tokens
from model.config import ModelConfig
from model.transformer import Transformer, initialise
from tests.tiny import MODEL


def continue_greedily(model: Transformer, prompt: list[int], num_tokens: int, stop: int) -> list[int]:
    return continue_tokens(model, prompt, num_tokens, stop=stop, temperature=0.0, seed=0)


def make_model(config: ModelConfig = MODEL) -> Transformer:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float64)
    initialise(model, 3)
    return model


def test_every_token_is_the_most_probable_after_those_before() -> None:
    model = make_model()
    made = continue_greedily(model, [5, 9], 8, stop=-1)
    assert len(made) == 8
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, *made]]))
    assert logits[0, 1:-1].argmax(-1).tolist() == made


def test_stop_token_ends_and_is_left_out() -> None:
    model = make_model()
    made = continue_greedily(model, [5, 9], 8, stop=-1)
    assert continue_greedily(model, [5, 9], 8, stop=made[3]) == made[: made.index(made[3])]


def test_length_never_passes_the_positions() -> None:
    model = make_model(replace(MODEL, max_position_tokens=6))
    assert len(continue_greedily(model, [1, 2, 3], 50, stop=-1)) == 3


def test_draws_follow_the_seed_and_the_probabilities() -> None:
    model = make_model()
    options = {"stop": -1, "temperature": 0.5}
    first = continue_tokens(model, [7], 30, seed=1, **options)  # type: ignore[arg-type]
    assert first == continue_tokens(model, [7], 30, seed=1, **options)  # type: ignore[arg-type]
    assert first != continue_tokens(model, [7], 30, seed=2, **options)  # type: ignore[arg-type]
    cold = continue_tokens(model, [7], 30, stop=-1, temperature=1e-9, seed=5)
    assert cold == continue_greedily(model, [7], 30, stop=-1)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        continue_greedily(make_model(), [], 4, stop=-1)

"""Tests that passes with a cache equal whole passes, for every shape, in ragged batches, with one or two new tokens."""

import pytest
import torch

from infer.decoder import Decoder
from model.transformer import Transformer
from tests.infer.models import SHAPES, make_model, whole_pass

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = (1, 9, 4)
STEPS = (1, 2, 1, 2, 2)


def texts(model: Transformer, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(0, model.config.vocab_size, (len(LENGTHS), length), generator=generator)
    return [[int(token) for token in text] for text in drawn]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_passes_equal_whole_ones(shape: str, dtype: torch.dtype) -> None:
    model, close = make_model(SHAPES[shape], dtype), {"rtol": 0.0, "atol": TOLERANCE[dtype]}
    text = texts(model, max(LENGTHS) + sum(STEPS) + 1)
    expected = [whole_pass(model, tokens) for tokens in text]
    decoder = Decoder(model, len(LENGTHS), len(text[0]) + 1, with_mtp=True)
    rows = [decoder.add() for _ in LENGTHS]
    states, logits = decoder.read_prompts(rows, [tokens[:n] for tokens, n in zip(text, LENGTHS, strict=True)])
    next_tokens = [tokens[1 : n + 1] for tokens, n in zip(text, LENGTHS, strict=True)]
    decoder.read_prompts_mtp(rows, next_tokens, torch.cat(list(states)))
    for row, length in enumerate(LENGTHS):
        decoder.main.resize(row, length)
        decoder.mtp.resize(row, length)
        torch.testing.assert_close(logits[row], expected[row][0][length - 1], **close)
    lengths = list(LENGTHS)
    for width in STEPS:
        new = torch.tensor([tokens[at : at + width] for tokens, at in zip(text, lengths, strict=True)])
        after = torch.tensor([tokens[at + 1 : at + width + 1] for tokens, at in zip(text, lengths, strict=True)])
        state_BSD, logits_BSV = decoder.step(new)
        chosen = torch.tensor([row % width for row in rows])
        drafted_BV = decoder.step_mtp(after, state_BSD, chosen)
        for row, at in enumerate(lengths):
            main, mtp = expected[row]
            torch.testing.assert_close(logits_BSV[row], main[at : at + width], **close)
            torch.testing.assert_close(drafted_BV[row], mtp[at + row % width], **close)
            lengths[row] += width
            decoder.main.resize(row, lengths[row])
            decoder.mtp.resize(row, lengths[row])


@torch.no_grad()
def test_whole_pass_of_these_tests_is_the_models_own() -> None:
    for config in SHAPES.values():
        model = make_model(config)
        (tokens, *_) = texts(model, 13)
        torch.testing.assert_close(model(torch.tensor([tokens]))[0], whole_pass(model, tokens)[0], rtol=0, atol=1e-11)


def begun(model: Transformer, text: list[list[int]], capacity: int) -> Decoder:
    """Returns a decoder with a row for each of `LENGTHS`, which has read that many tokens."""
    decoder = Decoder(model, len(LENGTHS), capacity, with_mtp=False)
    rows = [decoder.add() for _ in LENGTHS]
    decoder.read_prompts(rows, [tokens[:n] for tokens, n in zip(text, LENGTHS, strict=True)])
    for row, length in enumerate(LENGTHS):
        decoder.main.resize(row, length)
    return decoder


@torch.no_grad()
def test_tokens_taken_back_leave_no_trace() -> None:
    """Writes wrong tokens past a row's length, then the right ones, as after a rejected draft."""
    model = make_model()
    text = texts(model, 20)
    decoder = begun(model, text, 21)
    right = torch.tensor([tokens[n : n + 2] for tokens, n in zip(text, LENGTHS, strict=True)])
    clean = decoder.step(right)[1]
    decoder.step((right + 7) % model.config.vocab_size)
    torch.testing.assert_close(decoder.step(right)[1], clean, rtol=0, atol=0)


@torch.no_grad()
def test_rows_move_when_another_leaves() -> None:
    model = make_model()
    text = texts(model, 12)
    decoder = begun(model, text, 13)
    decoder.remove(0)
    assert decoder.main.lengths == (LENGTHS[2], LENGTHS[1])
    logits = decoder.step(torch.tensor([[text[2][LENGTHS[2]]], [text[1][LENGTHS[1]]]]))[1][:, 0]
    for logits_V, sequence in zip(logits, (2, 1), strict=True):
        expected = whole_pass(model, text[sequence][: LENGTHS[sequence] + 1])[0][-1]
        torch.testing.assert_close(logits_V, expected, rtol=0, atol=1e-10)

"""Tests of token ids of requests: the border of a choice, truncated contexts, and windows over documents."""

import pytest

from data.tokenizer import Tokenizer
from infer.evaluate.answers import document_windows, encode_continuation, target_sequence
from infer.evaluate.protocol import ContinuationRequest, DocumentRequest, EvaluationError

DOCUMENTS = ["def f(x):\n    return x + 1\n", "naïve café 🙂 日本語 text"] * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(DOCUMENTS, 320)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("def f(x):", " return"), ("def f(x): ", "return"), ("", "def"), ("  ", "x"), ("日", "本語"), ("re", "turn x")],
)
def test_context_and_choice_have_the_tokens_of_the_whole(tokenizer: Tokenizer, context: str, continuation: str) -> None:
    before, after = encode_continuation(
        tokenizer, ContinuationRequest(context=context, continuation=continuation, place="")
    )
    assert before[0] == tokenizer.begin_of_sentence_id
    assert after
    whole = tokenizer.prompt(context + continuation)
    assert whole[-len(after) :] == after
    # White space at the end of a context belongs to the choice.
    assert before == tokenizer.prompt(context.rstrip())[: len(before)]


def test_choice_that_merges_with_the_context_has_the_last_token(tokenizer: Tokenizer) -> None:
    # "return" is one token, and so is a beginning of it. The whole has no more tokens than the context.
    context = next("return"[:size] for size in range(5, 0, -1) if len(tokenizer.encode(" " + "return"[:size])) == 1)
    request = ContinuationRequest(context=" " + context, continuation="return"[len(context) :], place="")
    before, after = encode_continuation(tokenizer, request)
    assert (before, after) == ([tokenizer.begin_of_sentence_id], tokenizer.encode(" return"))


def test_long_contexts_lose_their_first_tokens(tokenizer: Tokenizer) -> None:
    request = ContinuationRequest(context=(5, 6, 7, 8, 9), continuation=(1, 2), place="choices[0]")
    sequence, num_dropped = target_sequence(tokenizer, request, 4)
    # Of begin of sentence and five tokens, two and the first token of the choice are inputs with the last one dropped.
    assert (sequence.tokens, sequence.num_targets, num_dropped) == ((7, 8, 9, 1, 2), 2, 3)
    with pytest.raises(EvaluationError, match=r"choices\[0\]: must have at most .*=1 tokens, has 2"):
        target_sequence(tokenizer, request, 1)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (4, None), (4, 1), (5, 3), (100, 7), (1, 1)])
@pytest.mark.parametrize("length", [0, 1, 4, 5, 17])
def test_windows_score_each_token_once(
    tokenizer: Tokenizer, window: int | None, stride: int | None, length: int
) -> None:
    tokens = tuple(range(30, 30 + length))
    windows = list(document_windows(tokenizer, DocumentRequest(text=tokens, window=window, stride=stride), 16))
    scored = [token for each in windows for token in each.tokens[len(each.tokens) - each.num_targets :]]
    assert scored == list(tokens)
    most = min(window or 16, 16)
    for number, each in enumerate(windows):
        assert len(each.tokens) <= most + 1
        assert 1 <= each.num_targets <= (most if number == 0 or stride is None else min(stride, most))
        # Context is as long as it can be: a window begins with the document, or is full.
        assert each.tokens[0] == tokenizer.begin_of_sentence_id or len(each.tokens) == most + 1

"""Converts the text of requests to token ids, and splits documents into windows. Imports no torch.

The rules are those of lm-evaluation-harness (EleutherAI, `TemplateLM._encode_pair` and `get_rolling_token_windows`), so
that numbers agree.
"""

from collections.abc import Iterator, Sequence

from data.tokenizer import Tokenizer
from infer.evaluate.config import EvaluationError
from infer.evaluate.protocol import TargetSequence
from infer.evaluate.requests import ContinuationRequest, DocumentRequest, Text


def context_tokens(tokenizer: Tokenizer, context: Text) -> list[int]:
    """Returns the begin-of-sentence token and the context.

    A tokenizer without that token puts nothing before a context, and the end of sentence before an empty one.
    """
    if isinstance(context, str):
        return tokenizer.prompt(context)
    begin = tokenizer.begin_of_sentence_id
    return [*([] if begin is None else [begin]), *context] or [tokenizer.end_of_sentence_id]


def encode_continuation(tokenizer: Tokenizer, request: ContinuationRequest) -> tuple[list[int], list[int]]:
    """Returns the token ids of a context and of its continuation.

    White space at the end of the context moves to the continuation, because tokens of most vocabularies begin with it.
    The context is tokenized alone and with the continuation; the continuation has the tokens of the whole after the
    number of tokens of the context. If the whole has no more tokens than the context, the continuation has the last.

    Raises:
        EvaluationError: the continuation is empty.
    """
    context, continuation = request.context, request.continuation
    before: Sequence[int]
    if isinstance(context, str) and isinstance(continuation, str):
        stripped, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
        size = min(len(stripped), max(len(whole) - 1, 0))
        before, after = (stripped if size == len(stripped) else whole[:size]), whole[size:]
    else:
        assert not isinstance(context, str)
        assert not isinstance(continuation, str)
        before, after = context, list(continuation)
    if not continuation or not after:
        raise EvaluationError(f"{request.place}: must have at least one token, has none")
    return context_tokens(tokenizer, tuple(before)), after


def target_sequence(tokenizer: Tokenizer, request: ContinuationRequest, max_tokens: int) -> tuple[TargetSequence, int]:
    """Returns the sequence that scores a continuation, and how many tokens of the context it drops.

    Tokens at the start are dropped if the sequence without its last token exceeds the model's positions.

    Raises:
        EvaluationError: the continuation is empty, or longer than the model has positions.
    """
    before, after = encode_continuation(tokenizer, request)
    if len(after) > max_tokens:
        raise EvaluationError(
            f"{request.place}: must have at most model.max_position_tokens={max_tokens} tokens, has {len(after)}"
        )
    num_dropped = max(0, len(before) + len(after) - 1 - max_tokens)
    return TargetSequence(tokens=(*before[num_dropped:], *after), num_targets=len(after)), num_dropped


def document_windows(tokenizer: Tokenizer, request: DocumentRequest, max_tokens: int) -> Iterator[TargetSequence]:
    """Yields the windows of a document, so that each token is scored once.

    The first window begins with the begin-of-sentence token. Each further window has `window` tokens before its last
    one and scores its last `stride` tokens, or those that are left.
    """
    text = request.text
    tokens = tokenizer.encode(text) if isinstance(text, str) else list(text)
    window = min(request.window or max_tokens, max_tokens)
    stride = min(request.stride or window, window)
    whole = [*context_tokens(tokenizer, ()), *tokens]
    yield from _windows(whole, len(whole) - len(tokens), window, stride)


def _windows(whole: Sequence[int], first: int, window: int, stride: int) -> Iterator[TargetSequence]:
    """Yields windows over tokens that are scored from `first` on."""
    end = min(len(whole), window + 1)  # the last token of a window is only a target
    while first < len(whole):
        yield TargetSequence(tokens=tuple(whole[max(0, end - window - 1) : end]), num_targets=end - first)
        first, end = end, min(len(whole), end + stride)

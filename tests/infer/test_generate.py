"""Generation, passes with a cache, penalties and text streams."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from infer.config import GenerateError, Sampling, Speculative
from infer.decoder import Decoder
from infer.engines.local import LocalEngine
from infer.protocol import REPLACEMENT, NumberedPrompt, Request, TextStream
from infer.sample import TokenHistory, penalize
from model.pretrained import load_hf
from model.transformer import Transformer
from tests.infer.continuing import generate
from tests.infer.models import SHAPES, SMALL, make_foresighted, make_model, whole_pass
from tests.model.hf_checkpoints import YARN, mtp_tensors, random_tokens, read_tensors, reference_model, write_tensors

PROMPTS = [[5, 9], [1, 2, 3, 4, 5, 6, 7], [8], [100, 200, 300], [7, 7, 7, 7]]
WARM = Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=4)


def made(model: Transformer, prompts: list[list[int]], num_tokens: int, **options: Any) -> list[list[int]]:
    generation = generate(model, prompts, max_new_tokens=num_tokens, **options)
    return [list(continuation.tokens) for continuation in generation.continuations]


@pytest.mark.parametrize("speculative", [False, True])
def test_every_token_is_the_most_probable_after_those_before(speculative: Speculative) -> None:
    model = make_foresighted()
    for prompt, tokens in zip(PROMPTS, made(model, PROMPTS, 12, speculative=speculative), strict=True):
        assert len(tokens) == 12
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]))
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.covering(1)
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_batch_size_changes_no_token(speculative: Speculative, sampling: Sampling) -> None:
    model = make_foresighted()
    options = {"sampling": sampling, "speculative": speculative, "stop": [3, 50, 111, 162]}
    alone = made(model, PROMPTS, 15, batch_size=1, **options)
    assert len({len(tokens) for tokens in alone}) > 1, "all end at the same length: nothing is ragged here"
    for batch_size in (2, 3, 16):
        assert made(model, PROMPTS, 15, batch_size=batch_size, **options) == alone


@pytest.mark.parametrize("speculative", [False, True])
def test_draws_depend_on_seed_and_number_not_on_other_prompts(speculative: Speculative) -> None:
    model = make_foresighted()
    options = {"sampling": WARM, "speculative": speculative}
    first = made(model, PROMPTS, 10, **options)
    others = [[9, 9, 9], *PROMPTS[1:3], [4], [11, 12]]
    again = made(model, others, 10, **options)
    assert again[1:3] == first[1:3]
    assert again[0] != first[0]
    assert made(model, PROMPTS, 10, sampling=replace(WARM, seed=5), speculative=speculative)[1] != first[1]
    twins = made(model, [PROMPTS[1]] * 4, 10, **options)
    assert len({tuple(tokens) for tokens in twins}) == 4


@pytest.mark.parametrize("speculative", [False, True])
def test_stop_tokens_end_and_are_left_out(speculative: Speculative) -> None:
    model = make_foresighted()
    (free,) = made(model, [[5, 9]], 12, speculative=speculative)
    for at, token in list(enumerate(free))[:6]:
        end = free.index(token)
        generation = generate(model, [[5, 9]], max_new_tokens=12, stop=[token, 319], speculative=speculative)
        assert generation.continuations[0].tokens == tuple(free[:end]), at
        assert generation.continuations[0].finish == "stop"
    both = generate(model, [[5, 9]], max_new_tokens=12, stop=[free[7], free[4]], speculative=speculative)
    assert list(both.continuations[0].tokens) == free[: min(free.index(free[7]), free.index(free[4]))]


@pytest.mark.parametrize("speculative", [False, True])
def test_length_is_exact_and_never_passes_the_positions(speculative: Speculative) -> None:
    model = make_foresighted()
    (longest,) = made(model, [[1, 2, 3]], 9, speculative=False)
    for num_tokens in (0, 1, 2, 9):
        generation = generate(model, [[1, 2, 3]], max_new_tokens=num_tokens, speculative=speculative)
        assert list(generation.continuations[0].tokens) == longest[:num_tokens]
        assert generation.continuations[0].finish == "length"
    bounded = make_foresighted(replace(SMALL, max_position_tokens=8))
    prompts = [list(range(1, length + 1)) for length in (3, 7, 8)]
    assert [len(tokens) for tokens in made(bounded, prompts, 50, speculative=speculative)] == [5, 1, 0]
    assert made(bounded, prompts[:1], 50, speculative=speculative) == [longest[:5]]


@pytest.mark.parametrize("speculative", [False, True])
def test_stream_gives_the_same_tokens_as_they_are_made(speculative: Speculative) -> None:
    model = make_foresighted()
    stop = [50, 111]
    whole = generate(model, PROMPTS, batch_size=2, max_new_tokens=9, sampling=WARM, stop=stop, speculative=speculative)
    engine = LocalEngine(model, batch_size=2, speculative=speculative)
    request = Request(samples=1, max_new_tokens=9, sampling=WARM, stop=frozenset(stop))
    numbered = [NumberedPrompt(number=at, tokens=tuple(prompt)) for at, prompt in enumerate(PROMPTS)]
    sequences = engine.start(numbered, request)
    assert engine.statistics.passes == 0
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    ended: list[int] = []
    largest = 0
    for sequence, new in engine.run(sequences):
        assert sequence.index not in ended
        tokens[sequence.index] += new
        largest = max(largest, len(new))
        if sequence.finish is not None:
            ended.append(sequence.index)
            assert sequence.finish == whole.continuations[sequence.index].finish
    assert sorted(ended) == list(range(len(PROMPTS)))
    assert [tuple(made) for made in tokens] == [continuation.tokens for continuation in whole.continuations]
    assert largest == (2 if speculative else 1)
    assert replace(engine.statistics, seconds=0.0) == replace(whole.statistics, seconds=0.0)


@pytest.mark.parametrize("speculative", [False, True])
def test_caller_may_end_a_prompt_at_any_token(speculative: Speculative) -> None:
    model = make_foresighted()
    free = made(model, PROMPTS, 9, speculative=speculative)
    for at in (0, 3, 8):
        calls: list[tuple[int, int]] = []

        def ends(index: int, token: int, calls: list[tuple[int, int]] = calls, at: int = at) -> bool:
            calls.append((index, token))
            return index == 1 and sum(number == 1 for number, _ in calls) == at + 1

        generation = generate(model, PROMPTS, max_new_tokens=9, speculative=speculative, stop_condition=ends)
        expected = [free[0], free[1][: at + 1], *free[2:]]
        assert [list(continuation.tokens) for continuation in generation.continuations] == expected
        assert generation.continuations[1].finish == "stop"
        assert [[token for number, token in calls if number == index] for index in range(5)] == expected


def test_statistics_without_drafts_count_a_pass_for_each_token() -> None:
    generation = generate(make_model(), PROMPTS, max_new_tokens=6, speculative=False)
    statistics = generation.statistics
    assert (statistics.passes, statistics.tokens, statistics.drafts_offered) == (30, 30, 0)
    assert (statistics.drafts_offered, statistics.acceptance_rate) == (0, 0.0)
    assert statistics.seconds > 0
    assert statistics.summary() == "no drafts, 30 passes"


def test_no_prompts_make_nothing() -> None:
    assert generate(make_model(), [], max_new_tokens=4).continuations == ()


def test_generation_records_no_gradients_and_no_load() -> None:
    model = make_model()
    generate(model, PROMPTS, max_new_tokens=4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.load.any() for module in model.modules() if hasattr(module, "load"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("prompts", "options", "parts"),
    [
        ([[1], []], {}, ["prompt 2", "at least one token"]),
        ([[1], [2, 320]], {}, ["prompt 2", "from 0 to 319", "320"]),
        ([[-1]], {}, ["prompt 1", "-1"]),
        ([[1] * 65], {}, ["prompt 1", "max_position_tokens=64", "65"]),
        ([[1]], {"max_new_tokens": -1}, ["max_new_tokens", "-1"]),
        ([[1]], {"batch_size": 0}, ["batch_size", "0"]),
    ],
)
def test_what_cannot_be_continued_is_rejected(
    prompts: list[list[int]], options: dict[str, int], parts: list[str]
) -> None:
    with pytest.raises(GenerateError) as refused:
        generate(make_model(), prompts, **{"max_new_tokens": 3, **options})  # type: ignore[arg-type]
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.covering(1)
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_scores_that_are_no_numbers_are_rejected(speculative: Speculative, sampling: Sampling) -> None:
    model = make_model()
    with torch.no_grad():
        model.head_weight[7] = torch.nan
    with pytest.raises(GenerateError, match=r"^prompt 1: .*finite.* 0 new tokens"):
        generate(model, PROMPTS, max_new_tokens=3, sampling=sampling, speculative=speculative)


def test_drafter_that_gives_no_numbers_costs_its_drafts_alone() -> None:
    for sampling in (Sampling(), WARM):
        model = make_model()
        expected = generate(model, PROMPTS, max_new_tokens=5, speculative=False).continuations
        with torch.no_grad():
            model.mtp_block(1).eh_proj.weight.fill_(torch.nan)
        made_with = generate(model, PROMPTS, max_new_tokens=5, sampling=sampling, speculative=True)
        assert made_with.statistics.tokens == 25
        assert sampling.temperature > 0 or made_with.continuations == expected


def test_drafts_without_an_mtp_module_are_rejected_and_auto_does_without() -> None:
    model = make_model(replace(SMALL, mtp_depth=0))
    with pytest.raises(GenerateError, match=r"^speculative: .*MTP"):
        generate(model, [[1]], max_new_tokens=3, speculative=True)
    assert generate(model, [[1]], max_new_tokens=3).statistics.drafts_offered == 0


def test_latent_of_an_odd_size_is_decoded_one_token_at_a_time() -> None:
    model = make_model(replace(SMALL, kv_lora_rank=7), torch.float32)
    (tokens,) = made(model, [[5]], 6, speculative=False)
    with torch.no_grad():
        logits = model(torch.tensor([[5, *tokens]]))
    assert logits[0, :-1].argmax(-1).tolist() == tokens


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = (1, 9, 4)
STEPS = (1, 2, 1, 2, 2)


def texts(model: Transformer, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(0, model.config.vocab_size, (len(LENGTHS), length), generator=generator)
    return [[int(token) for token in text] for text in drawn]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_passes_equal_whole_ones(shape: str, dtype: torch.dtype) -> None:
    model, close = make_model(SHAPES[shape], dtype), {"rtol": 0.0, "atol": TOLERANCE[dtype]}
    text = texts(model, max(LENGTHS) + sum(STEPS) + 1)
    expected = [whole_pass(model, tokens) for tokens in text]
    decoder = Decoder(model, len(LENGTHS), len(text[0]) + 1, with_mtp=True)
    rows = [decoder.add() for _ in LENGTHS]
    read = decoder.read(rows, [tokens[:n] for tokens, n in zip(text, LENGTHS, strict=True)])
    next_tokens = [tokens[1 : n + 1] for tokens, n in zip(text, LENGTHS, strict=True)]
    decoder.read_mtp(rows, next_tokens, torch.cat([states for states, _ in read]))
    for row, length in enumerate(LENGTHS):
        decoder.main.resize(row, length)
        decoder.mtp.resize(row, length)
        torch.testing.assert_close(decoder.logits(read[row][1])[-1], expected[row][0][length - 1], **close)  # type: ignore[arg-type]
    lengths = list(LENGTHS)
    for width in STEPS:
        new = torch.tensor([tokens[at : at + width] for tokens, at in zip(text, lengths, strict=True)])
        after = torch.tensor([tokens[at + 1 : at + width + 1] for tokens, at in zip(text, lengths, strict=True)])
        state_BSD, logits_BSV = decoder.step(new)
        chosen = torch.tensor([row % width for row in rows])
        drafted_BV = decoder.step_mtp(after, state_BSD, chosen)
        for row, at in enumerate(lengths):
            main, mtp = expected[row]
            torch.testing.assert_close(logits_BSV[row], main[at : at + width], **close)  # type: ignore[arg-type]
            torch.testing.assert_close(drafted_BV[row], mtp[at + row % width], **close)  # type: ignore[arg-type]
            lengths[row] += width
            decoder.main.resize(row, lengths[row])
            decoder.mtp.resize(row, lengths[row])


def begun(model: Transformer, text: list[list[int]], capacity: int) -> Decoder:
    """Returns a decoder with a row for each of `LENGTHS`, which has read that many tokens."""
    decoder = Decoder(model, len(LENGTHS), capacity, with_mtp=False)
    rows = [decoder.add() for _ in LENGTHS]
    decoder.read(rows, [tokens[:n] for tokens, n in zip(text, LENGTHS, strict=True)])
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


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_q_lora": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 128},
}


@pytest.mark.parametrize("shape", CHANGES)
@torch.no_grad()
def test_greedy_continuations_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    reference = reference_model(3, **CHANGES[shape])
    prompts = random_tokens(3, 9)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, 9:].tolist()
    reference.save_pretrained(tmp_path)
    write_tensors(tmp_path, {**read_tensors(tmp_path), **mtp_tensors(tmp_path)})
    model = load_hf(tmp_path, torch.float32)
    assert model.config.mtp_depth == 1
    for speculative in (False, True):
        made = generate(model, prompts.tolist(), max_new_tokens=24, speculative=speculative)
        assert [list(continuation.tokens) for continuation in made.continuations] == expected
        assert bool(made.statistics.drafts_offered) == speculative


CPU = torch.device("cpu")


def test_penalties_change_logits_of_tokens_that_occurred() -> None:
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    history = TokenHistory.of([([0, 1, 1], [1, 3, 3])], 5, CPU)
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
            history = TokenHistory.of([(prompt, tokens[:at])], logits_TV.shape[1], CPU)
            assert int(penalize(logits_TV[at : at + 1], history, sampling).argmax()) == token, at


TOKENIZER = Tokenizer.train(["def f(x):\n    return x + 1\n", "naïve café 🙂 日本語 text"] * 9, 290)
TEXTS = ["def g(y): return 2", "žluťoučký kůň", "日本語🙂🙂 e\u0301", "a\ufffdb", "", "<｜User｜>"]


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.close()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_whole_characters(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    pieces = pieces_of(TextStream(TOKENIZER.decode), tokens)
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)
    assert all("".join(pieces[: at + 1]) == text[: len("".join(pieces[: at + 1]))] for at in range(len(pieces)))


def test_character_comes_with_its_last_byte() -> None:
    tokens = TOKENIZER.encode("ů")
    assert len(tokens) == 2
    stream = TextStream(TOKENIZER.decode)
    assert [stream.push(token) for token in tokens] == ["", "ů"]


def test_pieces_of_any_tokens_are_their_text() -> None:
    """The texts have special tokens, invalid bytes, and incomplete characters at the end."""
    chance = random.Random(5)
    for _ in range(300):
        tokens = [chance.randrange(TOKENIZER.vocab_size) for _ in range(chance.randrange(30))]
        pieces = pieces_of(TextStream(TOKENIZER.decode), tokens)
        assert "".join(pieces) == TOKENIZER.decode(tokens)


def test_stop_string_ends_as_in_the_whole_text() -> None:
    chance = random.Random(6)
    stopped = 0
    for _ in range(400):
        text = "".join(chance.choice("abů") for _ in range(chance.randrange(20)))
        stops = ["".join(chance.choice("abů") for _ in range(chance.randrange(1, 5))) for _ in range(2)]
        stream = TextStream(TOKENIZER.decode, stops)
        pieces = pieces_of(stream, TOKENIZER.encode(text))
        # The stop text that is complete first ends the text; of several the one that begins first.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        first = min(ends)[0] if ends else 0
        begins = [text[:first].find(stop) for stop in stops if stop in text[:first]]
        assert stream.is_stopped == bool(ends)
        assert "".join(pieces) == (text[: min(begins)] if ends else text)
        stopped += stream.is_stopped
    assert 100 < stopped < 400


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(lambda ids: "".join(chr(number) for number in ids), ["\n\ndef"])
    assert [stream.push(ord(letter)) for letter in "x\n\ny\n\nde"] == ["x", "", "", "\n\ny", "", "", "", ""]
    assert not stream.is_stopped
    assert stream.close() == "\n\nde"

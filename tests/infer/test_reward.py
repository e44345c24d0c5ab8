"""Scores of answers: the same in any batch, padding or packing, and in transformers; verdicts of a judge."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from data.arithmetic import arithmetic_tokenizer
from data.chat.encode import encode_conversations
from data.chat.messages import read_conversation
from data.chat.templates import CHAT_TEMPLATES
from infer.cohorts import CohortSizes
from infer.config import GenerateError, Sampling
from infer.decoder import PassKind
from infer.engines.rounds import NOTHING, Cohort, RoundFormat, RoundPlan
from infer.reward import JudgedAnswer, VerdictTokens, judge_answers, score_answers
from kernels.attention.documents import Documents
from model.head import score_states
from model.pretrained import load_hf, save_hf
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.infer.continuing import generate
from tests.pairs import batch_of, draw_pairs, scores_at
from tests.tiny import MODEL

REWARD_MODEL = replace(MODEL, head="score", mtp_depth=0)
END = 1


def reward_model(dtype: torch.dtype = torch.float32) -> Transformer:
    """A model with a score head that is not zero."""
    model = Transformer(REWARD_MODEL, LocalDispatcher(REWARD_MODEL.num_routed_experts), dtype)
    initialize_weights(model, 3)
    named = named_tensors(model)
    assert not named["score.weight"].any()
    named["score.weight"].normal_(0.0, (MODEL.hidden_size + 1) ** -0.5, generator=torch.Generator().manual_seed(4))
    return model


def answers(number: int) -> list[list[int]]:
    """Prompts with an end of sentence inside, and answers that end with one."""
    pairs = draw_pairs(5, number, MODEL.vocab_size, longest=9)
    return [[*pair.prompt, END, *pair.prompt, *pair.chosen] for pair in pairs]


def test_score_does_not_depend_on_batch_padding_or_packing() -> None:
    model, sequences = reward_model(), answers(24)
    alone = score_answers(model, sequences, batch_size=1)
    assert max(alone) - min(alone) > 0.1
    for batch_size in (2, 7, 24):
        assert score_answers(model, sequences, batch_size) == pytest.approx(alone, abs=1e-6)
    # Packed: all pieces of a row are masked from each other, and positions start again.
    pairs = draw_pairs(6, 9, MODEL.vocab_size)
    batch = batch_of([pairs[:4], pairs[4:]], 64)
    scores_BT: Tensor = score_states(
        model.final_states(batch.tokens_BT, Documents.from_positions(batch.positions_BT)), model.head_weight
    )
    for row, held in enumerate((pairs[:4], pairs[4:])):
        for number, pair in enumerate(held, 1):
            both = score_answers(model, [(*pair.prompt, *pair.chosen), (*pair.prompt, *pair.rejected)])
            packed = [float(scores_at(scores_BT, batch, row, sign * number)) for sign in (1, -1)]
            assert both == pytest.approx(packed, abs=1e-6)


@pytest.mark.parametrize("pad", [None, 2])
def test_transformers_reads_the_exported_model_with_equal_scores(tmp_path: Path, pad: int | None) -> None:
    """Without a token for padding, transformers scores one sequence at a time; with one, padded batches."""
    model, sequences = reward_model(), answers(6)
    save_hf(model, tmp_path / "rm")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    assert type(theirs).__name__ == "DeepseekV3ForSequenceClassification"
    theirs.config.pad_token_id = pad
    length = max(map(len, sequences))
    batches = [[sequence] for sequence in sequences]
    if pad is not None:
        batches = [[[*sequence, *[pad] * (length - len(sequence))] for sequence in sequences]]
    with torch.no_grad():
        found = torch.cat([theirs(torch.tensor(batch)).logits for batch in batches])
    assert found.shape == (6, 1)
    assert found[:, 0].tolist() == pytest.approx(score_answers(model, sequences), abs=1e-5)
    read = load_hf(tmp_path / "rm", torch.float32)
    assert read.config == REWARD_MODEL
    assert score_answers(read, sequences) == score_answers(model, sequences)


def test_a_model_that_transformers_saved_is_read_with_equal_scores(tmp_path: Path) -> None:
    save_hf(reward_model(), tmp_path / "rm")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "again")
    sequences = answers(3)
    assert score_answers(load_hf(tmp_path / "again", torch.float32), sequences) == pytest.approx(
        score_answers(reward_model(), sequences), abs=1e-6
    )


def test_verdict_is_the_probability_of_its_words() -> None:
    model = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float32)
    initialize_weights(model, 3)
    prompts, yes, no = [(5, 6, 7), (8, 9), (8, 9)], (10, 11), (12,)
    judged = [VerdictTokens(prompt=prompt, yes=yes, no=no) for prompt in prompts]
    found = judge_answers(model, judged, batch_size=4)
    with torch.no_grad():
        for prompt, verdict in zip(prompts, found, strict=True):
            logs = model(torch.tensor([[*prompt, *yes]])).log_softmax(-1)[0]
            place = len(prompt) - 1
            assert verdict.yes == pytest.approx(float((logs[place, 10] + logs[place + 1, 11]).exp()), rel=1e-5)
            assert verdict.no == pytest.approx(float(logs[place, 12].exp()), rel=1e-5)
            assert verdict.score == pytest.approx(verdict.yes / (verdict.yes + verdict.no))


def test_scoring_rejects_what_the_model_cannot_score() -> None:
    model = reward_model()
    tokens = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float32)
    with pytest.raises(GenerateError, match=r"model\.head: must be score, is tokens"):
        score_answers(tokens, [[1]])
    with pytest.raises(GenerateError, match=r"model\.head: must be tokens, is score"):
        judge_answers(model, [VerdictTokens(prompt=(1,), yes=(1,), no=(2,))])
    with pytest.raises(GenerateError, match=r"model\.head: must be tokens to continue prompts"):
        generate(model, [[3, 4]], max_new_tokens=1, sampling=Sampling(temperature=0.0, seed=0), stop=[])
    for sequence, rule in ([], "has none"), ([3] * 65, "is 65"), ([320], "contains 320"):
        with pytest.raises(GenerateError, match=rule):
            score_answers(model, [sequence])
    with pytest.raises(GenerateError, match="batch_size: must be at least 1"):
        score_answers(model, [[3]], batch_size=0)
    with pytest.raises(GenerateError, match="answer 1: yes must have at least one token"):
        judge_answers(tokens, [VerdictTokens(prompt=(3,), yes=(), no=(1,))])


def test_judged_tokens_are_those_that_training_reads() -> None:
    """Text before the verdict, verdict and end are the tokens of the conversation on which a judge is trained."""
    tokenizer, template = arithmetic_tokenizer(), CHAT_TEMPLATES.get("v3")
    for approves in (True, False):
        sample = JudgedAnswer(prompt="21=", answer="12", critique="1 2", approves=approves)
        record = json.loads(json.dumps(sample.record()))
        conversation = read_conversation(record, "line 1")
        (encoded,) = encode_conversations([conversation], template, tokenizer)
        judged = sample.tokens(template, tokenizer)
        verdict = judged.yes if approves else judged.no
        assert encoded.ids == [*judged.prompt, *verdict, tokenizer.special.eos]
        assert judged.yes != judged.no
        assert encoded.is_target[len(judged.prompt) :] == [True] * (len(verdict) + 1)


def test_packed_rounds_are_unpacked() -> None:
    generator, cpu = random.Random(2), torch.device("cpu")
    form = RoundFormat(max_rows=5, hidden_size=6, dtype=torch.bfloat16)
    kinds: tuple[PassKind, ...] = ("parts", "step")
    for kind in kinds:
        for num_rows in range(6):
            counts = tuple(generator.randrange(3) for _ in range(num_rows))
            plan = RoundPlan(
                kind=kind,
                sources=tuple(generator.randrange(-1, 5) for _ in range(num_rows)),
                lengths=tuple(generator.randrange(9) for _ in range(num_rows)),
                counts=counts,
                places=tuple(generator.randrange(50) for _ in range(num_rows)),
            )
            assert plan.rows == tuple(row for row in range(num_rows) if counts[row])
            tokens_N = torch.randint(0, 2**40, (plan.num_tokens,))
            hidden_ND = torch.randn(plan.num_tokens, 6, dtype=torch.bfloat16)
            packed = form.pack(plan, tokens_N, cpu)
            found, payload = form.unpack(packed)
            assert found == plan
            assert torch.equal(form.token_ids(payload), tokens_N)
            assert len(payload) == form.num_payload_bytes("tokens", packed[: form.plan_bytes])
            packed = form.pack(plan, hidden_ND, cpu)
            found, payload = form.unpack(packed)
            assert found == plan
            assert torch.equal(form.hidden(payload), hidden_ND)
            assert len(payload) == form.num_payload_bytes("activation", packed[: form.plan_bytes])
    empty = form.pack(RoundPlan(), None, cpu)
    assert len(empty) == form.plan_bytes
    assert form.unpack(empty)[0] == RoundPlan()


def test_cohort_alternates_with_its_caller_and_ends() -> None:
    seen: list[float] = []
    plans = [RoundPlan(sources=(0,), lengths=(number,), counts=(1,), places=(0,)) for number in range(3)]

    def program() -> None:
        assert not torch.is_grad_enabled()
        for plan in plans:
            seen.append(float(cohort.exchange(plan, torch.tensor([1]))))

    cohort = Cohort(program, "test")
    found = [cohort.start()[0]]
    for number in range(3):
        assert cohort.is_running
        found.append(cohort.resume(torch.tensor(float(number)))[0])
    assert found == [*plans, NOTHING[0]]
    assert seen == [0.0, 1.0, 2.0]
    assert not cohort.is_running
    cohort.close()


def test_cohort_that_is_closed_leaves_no_thread() -> None:
    cohort = Cohort(lambda: cohort.exchange(RoundPlan(), torch.tensor([1])) and None, "test")  # type: ignore[arg-type]
    cohort.start()
    thread = cohort._thread
    assert thread.is_alive()
    cohort.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [GenerateError("prompt 1: wrong"), RuntimeError("a bug")])
def test_cohort_keeps_errors_of_the_user_and_raises_others(error: Exception) -> None:
    def program() -> None:
        cohort.exchange(RoundPlan(sources=(-1,), lengths=(0,), counts=(1,), places=(0,)), torch.tensor([1]))
        raise error

    cohort = Cohort(program, "test")
    cohort.start()
    if isinstance(error, GenerateError):
        assert cohort.resume(torch.tensor(0.0)) is NOTHING
        assert cohort.error is error
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            cohort.resume(torch.tensor(0.0))
    assert not cohort.is_running


@pytest.mark.parametrize("name", ["cohorts", "max_rows", "prefill_tokens"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(GenerateError, match=f"{name}: must be at least 1, is 0; nearest valid: 1"):
        CohortSizes(**{name: 0})


def test_few_rows_are_not_divided_into_cohorts() -> None:
    def counts(ranks: int, directions: int, **sizes: int) -> list[int]:
        placement = tuple(tuple(range(ranks)) for _ in range(directions))
        return [CohortSizes(**sizes).num_cohorts(placement, rows) for rows in (0, 1, 32, 33, 64, 65, 1000)]

    assert counts(1, 2) == [1] * 7
    assert counts(2, 2) == [1, 1, 1, 2, 2, 2, 2]
    assert counts(4, 1) == [1, 1, 1, 2, 2, 3, 8]
    # Rows of which a cohort holds few need as many cohorts as before.
    assert counts(4, 1, max_rows=8) == [1, 1, 4, 5, 8, 8, 8]
    assert counts(4, 1, cohorts=3) == [3] * 7

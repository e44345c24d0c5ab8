"""Scores of answers: the same in any batch, padding or packing, and in transformers; verdicts of a judge."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from data.arithmetic import arithmetic_tokenizer
from data.chat.encode import encode_conversations
from data.chat.records import read_conversation
from data.chat.templates import CHAT_TEMPLATES
from infer.config import GenerateError, Sampling
from infer.critique import JudgedAnswer
from infer.generate import generate
from infer.reward import VerdictTokens, judge_answers, score_answers
from kernels.attention.documents import Documents
from model.head import score_states
from model.hf.convert import load_hf, save_hf
from model.transformer import Transformer, initialize_weights, named_tensors
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
    for sequence, rule in ([], "has 0"), ([3] * 65, "has 65"), ([320], "contains 320"):
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
        assert encoded.ids == [*judged.prompt, *verdict, tokenizer.end_of_sentence_id]
        assert judged.yes != judged.no
        assert encoded.is_target[len(judged.prompt) :] == [True] * (len(verdict) + 1)

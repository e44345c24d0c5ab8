"""Trained, given and published tokenizers: ids, special tokens and rejected settings."""

import base64
import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from data.config import BatchSizes, DataConfig
from data.corpus import DataError
from data.loader import Loader
from data.prepare import check_config, prepare
from data.readers.sources import FilesSource, read_documents
from data.special_tokens import (
    BEGIN_OF_SENTENCE,
    END_OF_SENTENCE,
    FIM_BEGIN,
    FIM_HOLE,
    PAD,
    THINK,
    TOOL_SEPARATOR,
    SpecialNames,
)
from data.tokenizer import SPECIAL_TOKENS, USER, Tokenizer
from infer.protocol import TextStream
from tests.data.published_tokenizers import FAMILIES, write_family
from tests.data.released_tokenizer import VOCAB_SIZE, write_released
from tests.tiny import data_config, write_text

TEXTS = [f"def function_{number}(value):\n    return value + {number * 37}  # 数字 é\n" for number in range(200)]
TOKENIZER = Tokenizer.train(TEXTS, 400)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))  # type: ignore[arg-type]
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_ids_are_the_first_in_their_order() -> None:
    ids = [TOKENIZER.special_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(8))
    assert ids[:3] == [TOKENIZER.special.bos, TOKENIZER.special.eos, TOKENIZER.special.pad]
    assert TOKENIZER.decode(ids) == "".join(SPECIAL_TOKENS)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == ""


def test_text_never_becomes_a_special_token(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path / "tokenizer.json")):
        for token in SPECIAL_TOKENS:
            text = f"before {token} after"
            ids = tokenizer.encode(text)
            assert min(ids) >= len(SPECIAL_TOKENS)
            assert tokenizer.decode(ids) == text
            assert tokenizer.encode_batch([text]) == [ids]


def test_training_reaches_the_size_and_is_reproducible(tmp_path: Path) -> None:
    assert TOKENIZER.vocab_size == 400
    again = Tokenizer.train(iter(TEXTS), 400)
    again.save(tmp_path / "again.json")
    TOKENIZER.save(tmp_path / "first.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    assert len(again.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_a_tiny_corpus_gives_fewer_tokens_and_too_small_a_size_is_rejected() -> None:
    assert 256 + len(SPECIAL_TOKENS) < Tokenizer.train(["abab abab"], 4096).vocab_size < 300
    with pytest.raises(DataError, match=r"data\.tokenizer_vocab_size: must be at least 264 .* got 263; nearest: 264"):
        Tokenizer.train(["abab"], 255 + len(SPECIAL_TOKENS))


def test_saved_is_loaded_and_a_broken_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.vocab_size == TOKENIZER.vocab_size
    assert loaded.encode_batch(TEXTS) == TOKENIZER.encode_batch(TEXTS) == [TOKENIZER.encode(text) for text in TEXTS]
    path.write_text("{}", encoding="utf-8")
    for broken in (path, tmp_path / "missing.json"):
        with pytest.raises(DataError, match=broken.name):
            Tokenizer.load(broken)


@pytest.mark.slow
def test_128k_has_the_released_ids_and_learns_the_same_merges(tmp_path: Path) -> None:
    """The ids are those of the released `tokenizer.json`."""
    Tokenizer.train_128k(TEXTS).save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    released = {THINK: 128_798, FIM_BEGIN: 128_801, FIM_HOLE: 128_800, USER: 128_803, TOOL_SEPARATOR: 128_814}
    assert {token: tokenizer.special_id(token) for token in released} == released
    assert (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.pad) == (0, 1, 2)
    assert sorted(tokenizer.spellings()) == list(range(VOCAB_SIZE))
    assert tokenizer.spellings()[3] == "!"
    plain = Tokenizer.train(TEXTS, 4096)
    for text in (*TEXTS[:5], *tokenizer.placed_names.values(), "<｜place▁holder▁no▁1｜> naïve 🙂"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < 128_000
        assert [tokenizer.decode([token]) for token in ids] == [plain.decode([token]) for token in plain.encode(text)]
    assert tokenizer.num_learned == plain.num_learned


def test_digits_are_split_by_three_and_line_breaks_join_punctuation() -> None:
    tokenizer = Tokenizer.train(["1234567890);\n"] * 50, 300)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("1234567);\n")]
    assert pieces == ["123", "456", "7", ");\n"]


GIVEN_TEXTS = ["a1 b2 c3 d4 e5", "word word é数 other words"] * 20


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_text(tmp_path)
    tokenizer = write_released(tmp_path / "tokenizer.json", GIVEN_TEXTS)
    return data_config(tmp_path, tokenizer=str(tokenizer), tokenizer_vocab_size=10, fim_rate=0.3)


def test_given_tokenizer_cuts_and_fills_no_text_and_takes_no_special_token_from_it(config: DataConfig) -> None:
    assert config.tokenizer is not None
    tokenizer = Tokenizer.load(Path(config.tokenizer))
    assert tokenizer.vocab_size == VOCAB_SIZE
    special = {tokenizer.special_id(token) for token in SPECIAL_TOKENS}
    assert max(special) > 2**16
    for text in ("", "a", f"word é {'数' * 40}", *(f"before {token} after" for token in SPECIAL_TOKENS)):
        ids = tokenizer.encode(text)
        assert tokenizer.encode_batch([text]) == [ids]
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text
    assert max(tokenizer.encode(GIVEN_TEXTS[0])) > 2**16


def test_given_tokenizer_is_saved_byte_by_byte(config: DataConfig, tmp_path: Path) -> None:
    assert config.tokenizer is not None
    given = Tokenizer.load(Path(config.tokenizer))
    given.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == Path(config.tokenizer).read_bytes()
    assert Tokenizer.load(tmp_path / "again.json").fingerprint == given.fingerprint


def test_given_tokenizer_prepares_every_document_and_its_large_ids_stay(config: DataConfig) -> None:
    assert check_config(config) == VOCAB_SIZE
    prepared = prepare(dataclasses.replace(config, fim_rate=0.0), 512)
    assert prepared.tokenizer.vocab_size == VOCAB_SIZE
    assert prepared.train.tokens_NL[:].max() >= 2**16
    rows = [*prepared.train.tokens_NL[:].tolist(), *prepared.validation.tokens_NL[:].tolist()]
    written = "".join(prepared.tokenizer.decode(row) for row in rows)
    for document in read_documents(config.source):
        assert f"{BEGIN_OF_SENTENCE}{document.text}" in written
    loader = Loader(prepared, sizes=BatchSizes(1))
    batches = [loader.batch(step, 0, 1) for step in range(len(prepared.train.tokens_NL))]
    read = sorted(int(batch.tokens_BT.max()) for batch in batches)
    assert read == sorted(prepared.train.tokens_NL[:].max(axis=1).tolist())
    assert {batch.pad_id for batch in batches} == {2}


def test_given_tokenizer_counts_in_the_cache_by_its_content(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config, 16)
    entries = sorted(path.name for path in (tmp_path / "cache").iterdir())
    same = tmp_path / "elsewhere.json"
    same.write_bytes((tmp_path / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    changed = dataclasses.replace(config, tokenizer=str(same), tokenizer_vocab_size=300)
    assert prepare(changed, 16).fingerprint == first.fingerprint
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == entries
    other = write_released(tmp_path / "tokenizer.json", ["b2 b2 a1 é"] * 9)
    assert prepare(dataclasses.replace(config, tokenizer=str(other)), 16).fingerprint != first.fingerprint
    assert prepare(dataclasses.replace(changed, tokenizer=None), 16).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("without", "fim_rate", "missing"),
    [
        ([], 0.3, ""),
        ([USER], 0.3, ""),
        ([FIM_HOLE, USER], 0.0, ""),
        ([FIM_HOLE], 0.3, ""),
        ([PAD], 0.0, ""),
        ([BEGIN_OF_SENTENCE], 0.0, ""),
        ([END_OF_SENTENCE], 0.0, "tokenizer_eos"),
    ],
)
def test_given_tokenizer_needs_an_end_of_sentence_alone(
    without: list[str], fim_rate: float, missing: str, config: DataConfig, tmp_path: Path
) -> None:
    write_released(tmp_path / "tokenizer.json", GIVEN_TEXTS, without=without)
    config = dataclasses.replace(config, fim_rate=fim_rate)
    if not missing:
        check_config(config)
        assert prepare(config, 16).train.num_tokens > 0
        return
    for refuse in (check_config, lambda config: prepare(config, 16)):
        with pytest.raises(DataError) as refused:
            refuse(config)
        text = str(refused.value)
        assert text.startswith(f"data.{missing}: ")
        assert str(tmp_path / "tokenizer.json") in text
        assert f"nearest valid: {BEGIN_OF_SENTENCE}, {PAD}" in text


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_given_tokenizer_that_is_none_is_rejected_in_one_line(
    content: bytes | None, config: DataConfig, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        check_config(dataclasses.replace(config, tokenizer=str(path)))
    assert str(refused.value).startswith(f"data.tokenizer: {path} must be a saved tokenizer: ")
    assert "\n" not in str(refused.value)


PROSE = ["a", " two  spaces ", "def f(x):\n\treturn x\n\n", "naïve café 数字 🙂 \u00a0end", "12345 times, isn't it?"]

# Begin, end, padding, and whether there are marks of fill-in-the-middle.
EXPECTED = {
    "llama2_legacy": ("<s>", "</s>", "</s>", False),
    "llama2": ("<s>", "</s>", "</s>", False),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", False),
    "qwen": (None, "<|endoftext|>", "<|endoftext|>", True),
    "gpt2": (None, "<|endoftext|>", "<|endoftext|>", False),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", True),
    "kimi": ("[BOS]", "[EOS]", "[PAD]", False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_family(request.param, tmp_path_factory.mktemp(request.param))


def as_it_comes_back(name: str, text: str) -> str:
    """Metaspace prepends no space to a text that starts with one, and removes one when it decodes."""
    return text.removeprefix(" ") if name == "llama2" else text


def family_config(folder: Path, tokenizer: Path, **changes: Any) -> DataConfig:
    write_text(folder, num_files=12)
    return data_config(folder, tokenizer=str(tokenizer), fim_rate=0.5, **changes)


def test_special_tokens_are_those_that_the_files_name(family: tuple[str, Path]) -> None:
    name, path = family
    tokenizer = Tokenizer.load(path)
    begin, end, pad, has_fim = EXPECTED[name]
    assert tokenizer.token_names == {"bos_token": begin, "eos_token": end, "pad_token": pad}
    assert (tokenizer.special.fim is not None) == has_fim
    assert max(tokenizer.special.all_ids) < tokenizer.vocab_size


def test_text_has_the_tokens_of_transformers_and_round_trips(family: tuple[str, Path]) -> None:
    name, path = family
    tokenizer = Tokenizer.load(path)
    reference = None if name == "kimi" else PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in PROSE:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == as_it_comes_back(name, text)
        assert tokenizer.encode_batch([text]) == [ids]
        if reference is not None:
            assert ids == reference(text, add_special_tokens=False).input_ids


def test_a_document_begins_once_and_no_text_becomes_a_special_token(family: tuple[str, Path]) -> None:
    name, path = family
    tokenizer = Tokenizer.load(path)
    special = tokenizer.special
    for text in (*PROSE, *(f"before {token} after" for token in tokenizer.token_names.values())):
        ids = tokenizer.encode(text)
        assert not set(special.all_ids) & set(ids)
        assert tokenizer.decode(ids) == as_it_comes_back(name, text)
        begin = [] if EXPECTED[name][0] is None else [special.bos]
        assert tokenizer.document(ids) == [*begin, *ids, special.eos]
        assert tokenizer.prompt(text) == [*begin, *ids]
    assert tokenizer.prompt("") == [special.eos if special.bos is None else special.bos]


def test_a_saved_tokenizer_is_the_same_without_the_files_it_was_read_with(
    family: tuple[str, Path], tmp_path: Path
) -> None:
    _, path = family
    tokenizer = Tokenizer.load(path)
    written = tokenizer.save(tmp_path / "tokenizer.json")
    assert sorted(tmp_path.iterdir()) == sorted(written)
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.special == tokenizer.special
    assert again.encode(PROSE[3]) == tokenizer.encode(PROSE[3])
    named = Tokenizer.load(path, names=SpecialNames(bos="", eos=tokenizer.token_names["eos_token"], pad=None))
    named.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").special == named.special
    assert named.special.bos is None


def test_a_corpus_is_prepared_and_every_document_is_there(family: tuple[str, Path], tmp_path: Path) -> None:
    name, path = family
    config = family_config(tmp_path, path)
    check_config(config)
    prepared = prepare(config, 512)
    assert prepared.tokenizer.special == Tokenizer.load(path).special
    rows = [*prepared.train.tokens_NL[:].tolist(), *prepared.validation.tokens_NL[:].tolist()]
    ends = sum(row.count(prepared.tokenizer.special.eos) for row in rows)
    padding = int(np.sum(prepared.train.positions_NL[:] < 0) + np.sum(prepared.validation.positions_NL[:] < 0))
    assert ends == 12 + (padding if EXPECTED[name][1] == EXPECTED[name][2] else 0)
    fim = prepared.tokenizer.special.fim
    marked = 0 if fim is None else sum(row.count(fim[0]) for row in prepared.train.tokens_NL[:].tolist())
    assert (marked > 0) == EXPECTED[name][3]
    assert prepare(dataclasses.replace(config, tokenizer_bos=""), 512).train.num_tokens <= prepared.train.num_tokens


def test_streamed_text_is_the_text_that_continues_the_prompt(family: tuple[str, Path]) -> None:
    """A first token keeps the space that it begins with, and bytes become characters as they are complete."""
    tokenizer = Tokenizer.load(family[1])
    for text in ("The quick brown fox", "é🙂é 数字 12345 x", "a  b\n c"):
        ids = tokenizer.encode(text)
        for cut in range(len(ids)):
            if "\ufffd" in tokenizer.decode(ids[:cut]):
                continue
            prompt = tokenizer.document(ids[:cut])[:-1]
            stream = TextStream(tokenizer.decode, (), tokenizer.text_context(prompt))
            pieces = [*(stream.push(token) for token in ids[cut:]), stream.close()]
            assert tokenizer.decode(ids[:cut]) + "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)


def test_kimi_merges_as_the_ranks_say(tmp_path: Path) -> None:
    """Checks the merges against the definition: merge the pair with the lowest rank until no pair is a token."""
    path = write_family("kimi", tmp_path)
    ranks = {}
    for line in path.read_text("ascii").splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    tokenizer = Tokenizer.load(path)
    chance = random.Random(3)
    for _ in range(200):
        word = "".join(chance.choice("thequickbrownfoxreturn") for _ in range(chance.randrange(1, 14)))
        parts = [bytes([byte]) for byte in word.encode()]
        while pairs := [(ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        assert tokenizer.encode(word) == [ranks[part] for part in parts], word


def test_kimi_text_is_split_as_its_pattern_says(tmp_path: Path) -> None:
    Tokenizer.load(write_family("kimi", tmp_path)).save(tmp_path / "tokenizer.json")
    splitter = Backend.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    text = "HelloWorld's数字abc 12345!?\n\nx"
    pieces = [text[begin:end] for _, (begin, end) in splitter.pre_tokenize_str(text)]
    assert pieces == ["Hello", "World's", "数字", "abc", " ", "123", "45", "!?\n\n", "x"]


@pytest.mark.parametrize(
    ("family_name", "changes", "words"),
    [
        (
            "gpt2",
            {"tokenizer_eos": "<|endoftxt|>"},
            ["data.tokenizer_eos: ", "'<|endoftxt|>'", "nearest valid: <|endoftext|>"],
        ),
        ("llama3", {"tokenizer_bos": "<|start|>"}, ["data.tokenizer_bos: ", "must be a token of"]),
        ("llama2", {"tokenizer_pad": "e"}, ["data.tokenizer_pad: ", "must be a special token", "text can produce"]),
    ],
)
def test_a_wrong_name_is_rejected_with_the_nearest(
    family_name: str, changes: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    path = write_family(family_name, tmp_path / "tokenizer")
    with pytest.raises(DataError) as refused:
        check_config(family_config(tmp_path, path, **changes))
    text = str(refused.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", "[1]", "must be a JSON object, is of type list"),
        ("tokenizer_config.json", "{", "must be a JSON object, cannot be read"),
        ("tokenizer_config.json", '{"eos_token": "<gone>"}', "data.tokenizer_eos: must be set, because"),
        ("tiktoken.model", "YQ== 0\n", "its tokens must include all bytes"),
        ("tiktoken.model", "what\n", "line 1 must be a token in base64 and its rank"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "QWenTokenizer"}',
            "must have tokenizer_class TikTokenTokenizer",
        ),
    ],
)
def test_files_that_are_broken_are_named_in_one_line(name: str, content: str, words: str, tmp_path: Path) -> None:
    path = write_family("gpt2" if "gone" in content else "kimi", tmp_path / "tokenizer")
    (path.parent / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as refused:
        check_config(family_config(tmp_path, path))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_names_are_rejected_for_a_tokenizer_that_is_trained(tmp_path: Path) -> None:
    config = dataclasses.replace(family_config(tmp_path, tmp_path), tokenizer=None, tokenizer_eos="</s>")
    with pytest.raises(DataError, match=r"^data\.tokenizer_eos: must be null if a tokenizer is trained, is '</s>'"):
        check_config(config)


def test_the_field_of_the_text_is_chosen_and_a_missing_one_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(family_config(tmp_path, tmp_path), tokenizer=None)
    lines = [json.dumps({"id": "x", "content": f"line {number} of some words"}) for number in range(9)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    source = FilesSource(kind="files", paths=(str(tmp_path / "lines.jsonl"),), text_field="content")
    prepared = prepare(dataclasses.replace(config, source=source), 64)
    assert prepared.train.num_tokens + prepared.validation.num_tokens > 9 * 5
    with pytest.raises(DataError) as refused:
        check_config(dataclasses.replace(config, source=dataclasses.replace(source, text_field="text")))
    assert str(refused.value) == (
        f'{tmp_path / "lines.jsonl"}:1: a line of .jsonl must be an object with a string field "text" '
        f"(data.text_field), got the fields ['content', 'id']; nearest: data.text_field='content'"
    )

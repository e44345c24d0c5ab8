"""Tests of published tokenizers of every family: special tokens, documents with one begin, and decoding."""

import base64
import dataclasses
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from data.config import DataConfig
from data.corpus import DataError, FilesSource
from data.prepare import check_config, prepare
from data.special_tokens import SpecialNames
from data.tokenizer import Tokenizer
from infer.text import TextStream
from tests.data.published_tokenizers import FAMILIES, write_family
from tests.tiny import write_text

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


def data_config(folder: Path, tokenizer: Path, **changes: object) -> DataConfig:
    write_text(folder, num_files=12)
    config = DataConfig(
        source=FilesSource(kind="files", paths=(str(folder / "text"),), text_field="text"),
        tokenizer=str(tokenizer),
        tokenizer_bos=None,
        tokenizer_eos=None,
        tokenizer_pad=None,
        tokenizer_vocab_size=300,
        validation_fraction=0.2,
        fim_rate=0.5,
        seed=0,
        cache_dir=str(folder / "cache"),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


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
    config = data_config(tmp_path, path)
    check_config(config)
    prepared = prepare(config, 512)
    assert prepared.tokenizer.special == Tokenizer.load(path).special
    rows = [*prepared.train_tokens_NL.tolist(), *prepared.validation_tokens_NL.tolist()]
    ends = sum(row.count(prepared.tokenizer.end_of_sentence_id) for row in rows)
    padding = int(np.sum(prepared.train_positions_NL < 0) + np.sum(prepared.validation_positions_NL < 0))
    assert ends == 12 + (padding if EXPECTED[name][1] == EXPECTED[name][2] else 0)
    fim = prepared.tokenizer.special.fim
    marked = 0 if fim is None else sum(row.count(fim[0]) for row in prepared.train_tokens_NL.tolist())
    assert (marked > 0) == EXPECTED[name][3]
    assert prepare(dataclasses.replace(config, tokenizer_bos=""), 512).train_tokens <= prepared.train_tokens


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
        check_config(data_config(tmp_path, path, **changes))
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
        check_config(data_config(tmp_path, path))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_names_are_rejected_for_a_tokenizer_that_is_trained(tmp_path: Path) -> None:
    config = dataclasses.replace(data_config(tmp_path, tmp_path), tokenizer=None, tokenizer_eos="</s>")
    with pytest.raises(DataError, match=r"^data\.tokenizer_eos: must be null if a tokenizer is trained, is '</s>'"):
        check_config(config)


def test_the_field_of_the_text_is_chosen_and_a_missing_one_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(data_config(tmp_path, tmp_path), tokenizer=None)
    lines = [json.dumps({"id": "x", "content": f"line {number} of some words"}) for number in range(9)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    source = FilesSource(kind="files", paths=(str(tmp_path / "lines.jsonl"),), text_field="content")
    prepared = prepare(dataclasses.replace(config, source=source), 64)
    assert prepared.train_tokens + prepared.validation_tokens > 9 * 5
    with pytest.raises(DataError) as refused:
        check_config(dataclasses.replace(config, source=dataclasses.replace(source, text_field="text")))
    assert str(refused.value) == (
        f'{tmp_path / "lines.jsonl"}:1: a line of .jsonl must be an object with a string field "text" '
        f"(data.text_field), got the fields ['content', 'id']; nearest: data.text_field='content'"
    )

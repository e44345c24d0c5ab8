"""Builds small tokenizers with the parts of published ones, and the files that name their special tokens."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data.tokenizer import SPECIAL_TOKENS

TEXTS = ["def f(x):\n    return x + 1\n", "The quick brown fox, 12345 times.", "naïve café 数字 🙂"] * 20
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_family(family: str, folder: Path) -> Path:
    """Writes a tokenizer of a family with its files into a folder; returns the tokenizer's file."""
    folder.mkdir(parents=True, exist_ok=True)
    return FAMILIES[family](folder)


def _byte_level(split: str, special: list[str | AddedToken], bos: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    # Published tokenizers have their special tokens behind all others.
    for token in special:
        tokenizer.add_tokens([token])
    if bos is not None:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return tokenizer


def _saved(tokenizer: Tokenizer, folder: Path, **files: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return folder / "tokenizer.json"


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _llama2(folder: Path, *, legacy: bool) -> Path:
    """Builds SentencePiece's BPE with byte fallback. Spaces are U+2581, prepended by a normalizer or by Metaspace."""
    special = [_special(token) for token in ("<unk>", "<s>", "</s>")]
    bytes_left = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    trained.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    state = json.loads(trained.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].get)
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *bytes_left, *words])}
    merges = [tuple(pair) for pair in state["merges"]]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(special)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": {"content": "</s>"}}
    config = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer", "pad_token": None, **named}
    return _saved(tokenizer, folder, tokenizer_config=config)


def _llama3(folder: Path) -> Path:
    special = [_special(token) for token in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")]
    tokenizer = _byte_level(_LLAMA3_SPLIT, [*special], "<|begin_of_text|>")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return _saved(tokenizer, folder, tokenizer_config=config)


def _qwen(folder: Path) -> Path:
    """Builds a tokenizer without begin of sentence; its fill-in-the-middle markers are ordinary tokens."""
    special: list[str | AddedToken] = [_special(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    special += [AddedToken(token, special=False) for token in ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")]
    tokenizer = _byte_level(_GPT2_SPLIT, special, None)
    tokenizer.normalizer = normalizers.NFC()
    end = "<|endoftext|>"
    config = {"add_bos_token": False, "bos_token": None, "eos_token": end, "pad_token": end}
    number = tokenizer.token_to_id(end)
    generation = {"bos_token_id": number, "eos_token_id": [number], "pad_token_id": number}
    return _saved(tokenizer, folder, tokenizer_config=config, generation_config=generation)


def _gpt2(folder: Path) -> Path:
    """Builds a tokenizer with one special token, which only `special_tokens_map.json` names, as begin and as end."""
    end = "<|endoftext|>"
    tokenizer = _byte_level(_GPT2_SPLIT, [_special(end)], None)
    return _saved(tokenizer, folder, special_tokens_map={"bos_token": end, "eos_token": end, "unk_token": end})


def _deepseek(folder: Path) -> Path:
    begin, end, pad, *others = SPECIAL_TOKENS
    special: list[str | AddedToken] = [_special(token) for token in (begin, end, pad)]
    tokenizer = _byte_level(_LLAMA3_SPLIT, [*special, *(AddedToken(token) for token in others)], begin)
    config = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": begin},
        "eos_token": {"__type": "AddedToken", "content": end},
        "pad_token": {"__type": "AddedToken", "content": end},
    }
    return _saved(tokenizer, folder, tokenizer_config=config)


def _kimi(folder: Path) -> Path:
    """Builds a `tiktoken.model`, and names some of its 256 special tokens."""
    trained = _byte_level(_LLAMA3_SPLIT, [], None)
    vocab = trained.get_vocab(with_added_tokens=False)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    order = [bytes(byte_of[letter] for letter in token) for token in sorted(vocab, key=lambda token: vocab[token])]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(order)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n", encoding="ascii")
    first = len(order)
    named = {first: "[BOS]", first + 1: "[EOS]", first + 2: "<|im_end|>", first + 255: "[PAD]"}
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "added_tokens_decoder": {str(number): {"content": token, "special": True} for number, token in named.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "tiktoken.model"


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama2_legacy": lambda folder: _llama2(folder, legacy=True),
    "llama2": lambda folder: _llama2(folder, legacy=False),
    "llama3": _llama3,
    "qwen": _qwen,
    "gpt2": _gpt2,
    "deepseek": _deepseek,
    "kimi": _kimi,
}

"""Preserves a checkpoint's further content, from the source folder to the export.

This includes keys of `config.json` that do not describe the network, files next to the weights (tokenizer, chat
template, license), and stored frequencies of the rotary embedding.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from data.chat.templates import CHAT_TEMPLATE_NAME, CHAT_TEMPLATES, template_jinja
from data.special_tokens import GENERATION_NAME, TOKENIZER_CONFIG_NAME, TOKENS_MAP_NAME
from data.tokenizer import Tokenizer
from model.hf.config import TOKEN_ID_KEYS
from model.hf.files import HfError, parse_json
from model.hf.reader import HfReader
from train.checkpoint.manifest import MANIFEST_NAME, CheckpointError, read_manifest
from train.checkpoint.sources import CheckpointReader, is_hf_folder, is_same_tokenizer, source_config, source_folder
from train.config import TrainConfig

LARGEST_FILE_BYTES = 2**26
OLD_CHAT_TEMPLATE_NAME = "chat_template.json"
# Files that belong to a tokenizer in addition to `tokenizer.json`.
_TOKENIZER_PATTERNS = (
    TOKENIZER_CONFIG_NAME,
    TOKENS_MAP_NAME,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    CHAT_TEMPLATE_NAME,
    OLD_CHAT_TEMPLATE_NAME,
)
# Licenses apply with any tokenizer. The publisher's code (`auto_map`) is copied, but never run.
_KNOWN_TEMPLATES = frozenset(("563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64",))
"""SHA-256 of published chat templates, in addition to this project's own: DeepSeek-V3, as TRL stores it."""
_LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_MODEL_PATTERNS = (*_LICENCE_PATTERNS, "*.py", GENERATION_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreservedMetadata:
    """The metadata of a checkpoint that its export must contain again, by key, tensor name and file name."""

    config: Mapping[str, Any]
    rotary: Mapping[str, Tensor]
    files: Mapping[str, bytes]


NOTHING = PreservedMetadata(config={}, rotary={}, files={})


def read_preserved(path: str, key: str) -> PreservedMetadata:
    """Reads the metadata that is preserved with weights. It takes the arguments of `source_config`."""
    folder = source_folder(path, key)
    files = read_files(folder, (*_TOKENIZER_PATTERNS, *_MODEL_PATTERNS))
    if is_hf_folder(path):
        reader = HfReader(folder, drop_mtp=True)
        return PreservedMetadata(config=reader.checkpoint.carried, rotary=reader.rotary, files=files)
    config = read_manifest(folder, key).get("preserved", {})
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config", {}), dict):
        rule = "must be an object of keys and values, with an object under quantization_config if there is one"
        raise CheckpointError(f"{key}: preserved of {folder / MANIFEST_NAME} {rule}, is not")
    return PreservedMetadata(config=config, rotary=CheckpointReader(folder, key).rotary(), files=files)


def preserved_by_run(config: TrainConfig, tokenizer: Tokenizer) -> PreservedMetadata:
    """Returns the metadata that a run's checkpoints preserve: the part of the source's that still applies.

    If the run has another tokenizer, its files and token ids replace those of the source. If `data.tokenizer_eos` or a
    similar key names special tokens, files that contradict it are left out. If the run has another rotary embedding,
    stored frequencies are left out. A run on chats has its own chat template.
    """
    preserved = _preserved_of_source(config, tokenizer)
    name = config.data.source.chat_template
    if name is None:
        return preserved
    jinja = template_jinja(CHAT_TEMPLATES.get(name)).encode()
    files = {file: content for file, content in preserved.files.items() if file != OLD_CHAT_TEMPLATE_NAME}
    return replace(preserved, files={**files, CHAT_TEMPLATE_NAME: jinja})


def _preserved_of_source(config: TrainConfig, tokenizer: Tokenizer) -> PreservedMetadata:
    """Returns the metadata of the initial weights and of a given tokenizer's folder that still apply."""
    data = config.data
    tokenizer_path = config.data.tokenizer
    own_files = (
        {} if tokenizer_path is None else read_files(Path(tokenizer_path).expanduser().parent, _TOKENIZER_PATTERNS)
    )
    path, key = (config.resume, "resume") if config.resume is not None else (config.initial_weights, "init_from")
    if path is None:
        return PreservedMetadata(config={}, rotary={}, files=own_files)
    before = read_preserved(path, key)
    folder = source_folder(path, key)
    ids = before.config
    files = before.files
    if not is_same_tokenizer(folder, tokenizer):
        ids = {name: value for name, value in ids.items() if name not in TOKEN_ID_KEYS}
        files = {**read_files(folder, _LICENCE_PATTERNS), **own_files}
    elif any(name is not None for name in (data.tokenizer_bos, data.tokenizer_eos, data.tokenizer_pad)):
        # These files would contradict the configured names. An export writes new ones from the tokenizer.
        ids = {name: value for name, value in ids.items() if name not in TOKEN_ID_KEYS}
        files = {name: files[name] for name in files if name not in (TOKENS_MAP_NAME, GENERATION_NAME)}
    return PreservedMetadata(config=ids, rotary=before.rotary if _is_same_rope(path, key, config) else {}, files=files)


def without_unknown_templates(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """Leaves out chat templates that are neither published nor own, because servers run them."""
    left = {name: _without_unknown_template(name, content) for name, content in files.items()}
    changed = [name for name, content in files.items() if left[name] != content]
    return {name: content for name, content in left.items() if content is not None}, changed


def _without_unknown_template(name: str, content: bytes) -> bytes | None:
    if name == CHAT_TEMPLATE_NAME:
        return content if _is_known_template(content) else None
    if name not in (OLD_CHAT_TEMPLATE_NAME, TOKENIZER_CONFIG_NAME):
        return content
    try:
        values = parse_json(content, Path(name), "")
    except HfError:
        return None
    template = values.pop("chat_template", "")
    is_known = isinstance(template, str) and (not template or _is_known_template(template.encode("utf-8", "replace")))
    return content if is_known else _json(values) if values else None


def _is_known_template(content: bytes) -> bool:
    text = content.strip()
    own_templates = {template_jinja(template).encode().strip() for _, template in CHAT_TEMPLATES.items()}
    return text in own_templates or sha256(text).hexdigest() in _KNOWN_TEMPLATES


def read_files(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Reads the matching files of a folder, by name. Files above `LARGEST_FILE_BYTES` are left out."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(paths) if path.stat().st_size <= LARGEST_FILE_BYTES}


def server_files(tokenizer: Tokenizer, max_tokens: int) -> tuple[dict[str, int], dict[str, bytes]]:
    """Returns the keys of `config.json` and the files from which inference servers read special tokens."""
    names = tokenizer.token_names
    special = tokenizer.special
    numbers = {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
    ids = {key: number for key, number in numbers.items() if number is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        **names,
    }
    named = {key: name for key, name in names.items() if name is not None}
    files = {
        TOKENIZER_CONFIG_NAME: _json(config),
        TOKENS_MAP_NAME: _json(named),
        GENERATION_NAME: _json({"_from_model_config": True, **ids}),
    }
    return ids, files


def _is_same_rope(path: str, key: str, config: TrainConfig) -> bool:
    there = source_config(path, key, drop_mtp=True)
    return (there.rope_theta, there.rope_scaling) == (config.model.rope_theta, config.model.rope_scaling)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()

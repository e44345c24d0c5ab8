"""What a checkpoint carries that is neither weight nor architecture, from the folder it came from to its export.

That is: keys of `config.json` which say nothing about the network, files beside the weights (tokenizer, chat template,
licence), and stored frequencies of the rotary embedding. Nothing here imports torch before a tensor is asked for.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.special_tokens import GENERATION_NAME, TOKENIZER_CONFIG_NAME, TOKENS_MAP_NAME
from data.tokenizer import Tokenizer
from model.hf.config import TOKEN_ID_KEYS
from model.hf.names import layer_of
from train.checkpoint.manifest import TOKENIZER_NAME, CheckpointError, read_manifest
from train.checkpoint.sources import is_hf_folder, source_config, source_folder
from train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_FILE_BYTES = 2**26
# What a tokenizer needs beside its own file.
_TOKENIZER_PATTERNS = (
    TOKENIZER_CONFIG_NAME,
    TOKENS_MAP_NAME,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
# Licences bind whatever the tokenizer; code of the publisher (`auto_map`) is copied and never run.
_LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_MODEL_PATTERNS = (*_LICENCE_PATTERNS, "*.py", GENERATION_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreservedMetadata:
    """What is preserved.

    Attributes:
        config: keys of `config.json`.
        rotary: stored frequencies, by tensor name: {"dtype", "shape", "data"}, the last in base64.
        files: contents by plain file name, without `tokenizer.json`.
    """

    config: Mapping[str, Any]
    rotary: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, bytes]

    def record(self) -> dict[str, Any]:
        """Returns what the manifest holds of it; files lie beside the manifest."""
        return {"preserved": dict(self.config), "rotary": {name: dict(each) for name, each in self.rotary.items()}}


NOTHING = PreservedMetadata(config={}, rotary={}, files={})


def read_preserved(path: str, key: str) -> PreservedMetadata:
    """Returns what weights carry.

    Args:
        path: a Hugging Face folder, converted weights, a run's folder or a checkpoint.
        key: of the configuration that names it, for errors.

    Raises:
        CheckpointError, HfError: there are none, or what they say of themselves cannot be read.
    """
    folder = source_folder(path, key)
    files = read_files(folder, (*_TOKENIZER_PATTERNS, *_MODEL_PATTERNS))
    if is_hf_folder(path):
        from model.hf.reader import HfReader

        reader = HfReader(folder, drop_mtp=True)
        return PreservedMetadata(config=reader.checkpoint.carried, rotary=rotary_record(reader.rotary), files=files)
    manifest = read_manifest(folder, key)
    config, rotary = manifest.get("preserved"), manifest.get("rotary")
    return PreservedMetadata(
        config=config if isinstance(config, dict) else {},
        rotary=rotary if isinstance(rotary, dict) else {},
        files=files,
    )


def preserved_by_run(config: TrainConfig, tokenizer: Tokenizer) -> PreservedMetadata:
    """Returns what a run's checkpoints carry: what those it started from did, as far as it is still true.

    If the run has another tokenizer, files and token ids of the tokenizer before are left out for those of the new one,
    and if `data.tokenizer_eos` or the like names special tokens, those that say otherwise.
    If it has another rotary embedding, stored frequencies are.

    Args:
        config: of the run; `resume` names a checkpoint or None.
        tokenizer: of the run's samples.
    """
    data, given = config.data, config.data.tokenizer
    own_files = {} if given is None else read_files(Path(given).expanduser().parent, _TOKENIZER_PATTERNS)
    path, key = (config.resume, "resume") if config.resume is not None else (config.init_from, "init_from")
    if path is None:
        return PreservedMetadata(config={}, rotary={}, files=own_files)
    before, folder = read_preserved(path, key), source_folder(path, key)
    ids, files = before.config, before.files
    if not is_same_tokenizer(folder, tokenizer):
        ids = {name: value for name, value in ids.items() if name not in TOKEN_ID_KEYS}
        files = {**read_files(folder, _LICENCE_PATTERNS), **own_files}
    elif any(name is not None for name in (data.tokenizer_bos, data.tokenizer_eos, data.tokenizer_pad)):
        # Other files would contradict the names; an export writes them from the tokenizer.
        ids = {name: value for name, value in ids.items() if name not in TOKEN_ID_KEYS}
        files = {name: files[name] for name in files if name not in (TOKENS_MAP_NAME, GENERATION_NAME)}
    return PreservedMetadata(config=ids, rotary=before.rotary if _is_same_rope(path, key, config) else {}, files=files)


def is_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a folder's tokenizer, if it has one, is this one."""
    there = folder / TOKENIZER_NAME
    return not there.is_file() or sha256(there.read_bytes()).hexdigest() == tokenizer.fingerprint


def read_files(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Returns the files of a folder that match, by name; what is larger than any of their kind is left out."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(found) if path.stat().st_size <= LARGEST_FILE_BYTES}


def rotary_record(rotary: "Mapping[str, Tensor]") -> dict[str, dict[str, Any]]:
    """Returns stored frequencies as JSON holds them; main layers alone, as MTP modules come and go."""
    import torch

    from model.hf.dtypes import stored_dtype

    return {
        name: {
            "dtype": stored_dtype(values.dtype),
            "shape": list(values.shape),
            "data": base64.b64encode(values.contiguous().view(torch.uint8).numpy().tobytes()).decode(),
        }
        for name, values in rotary.items()
    }


def rotary_tensors(record: Mapping[str, Mapping[str, Any]], num_layers: int, folder: Path) -> "dict[str, Tensor]":
    """Returns stored frequencies of layers that there are.

    Raises:
        CheckpointError: the record is not one that `rotary_record` made.
    """
    import torch

    from model.hf.dtypes import TORCH_DTYPES
    from model.hf.names import is_rotary

    made: dict[str, Tensor] = {}
    try:
        for name, each in record.items():
            if not is_rotary(name):
                raise ValueError(f"{name!r} is not one of them")
            values = torch.frombuffer(bytearray(base64.b64decode(each["data"])), dtype=TORCH_DTYPES[each["dtype"]])
            if (layer_of(name) or 0) < num_layers:
                made[name] = values.reshape(each["shape"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: rotary must hold stored frequencies, does not ({error})") from error
    return made


def server_files(tokenizer: Tokenizer, max_tokens: int) -> tuple[dict[str, int], dict[str, bytes]]:
    """Returns keys of `config.json`, and files, that tell inference servers what a tokenizer calls its special tokens.

    Args:
        tokenizer: of the weights.
        max_tokens: the longest sequence.
    """
    names, special = tokenizer.token_names, tokenizer.special
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

"""Which tokenizer a run reads its text with: one that is named, or the one that its weights were trained with."""

from functools import partial
from pathlib import Path

from data.tokenizer import find_tokenizer_file, other_tokenizer
from train.checkpoint.manifest import CHECKPOINTS_NAME, TOKENIZER_NAME, find_checkpoint, read_manifest
from train.checkpoint.sources import source_folder
from train.checkpoint.verify import find_resumed, verify
from train.config.errors import ConfigError, nearest


def expand_tokenizer(tokenizer: object, init_from: object, resume: object) -> object:
    """The file that `data.tokenizer` stands for.

    Args:
        tokenizer: `auto`, a file, or a folder with a `tokenizer.json`: a Hugging Face folder, a checkpoint, a run's.
        init_from: the value of that key; `auto` takes its tokenizer where it brings one.
        resume: the value of that key; `auto` takes its tokenizer where that run was given one.

    Returns:
        A file's path; None: a tokenizer is to be trained. What is no text is given back, for the type's own error.

    Raises:
        ConfigError: there is no tokenizer at the path.
        CheckpointError: what `init_from` or `resume` names cannot be read.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    if tokenizer == "auto":
        found = _of_resumed(resume) if isinstance(resume, str) else _of_weights(init_from)
        return None if found is None else str(found)
    path = Path(tokenizer).expanduser()
    if tokenizer and path.is_dir():
        return str(_in_folder(path))
    if not tokenizer or not path.is_file():
        near = nearest(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
        hint = near if near.startswith("did you mean") else "nearest valid: auto, or null, which trains one"
        rule = f"must be auto, null, a {TOKENIZER_NAME} or a folder that holds one"
        raise ConfigError(f"data.tokenizer: {rule}, is {tokenizer!r}; {hint}")
    return tokenizer


def _of_weights(init_from: object) -> Path | None:
    if not isinstance(init_from, str):
        return None
    folder = source_folder(init_from, "init_from")
    path = find_tokenizer_file(folder)
    if path is None and (found := other_tokenizer(folder)):
        raise ConfigError(f"data.tokenizer: auto takes the tokenizer of init_from={init_from}, which {found}")
    return path


def _of_resumed(resume: str) -> Path | None:
    folder = find_resumed(resume, partial(verify, hashes=False)).folder
    data = read_manifest(folder).get("data")
    is_given = isinstance(data, dict) and data.get("tokenizer") == "given"
    return folder / TOKENIZER_NAME if is_given else None


def _in_folder(folder: Path) -> Path:
    if (folder / CHECKPOINTS_NAME).is_dir():
        folder = find_checkpoint(str(folder), "data.tokenizer")
    path = find_tokenizer_file(folder)
    if path is None:
        found = other_tokenizer(folder) or "holds none"
        raise ConfigError(f"data.tokenizer: {str(folder)!r} must hold a {TOKENIZER_NAME}, {found}")
    return path

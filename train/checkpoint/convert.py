"""Converts weights between forms of checkpoints, tensor by tensor, in one process for each file."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from base.figures import bytes_text
from base.files import write_synced
from data.chat.encode import check_tokens
from data.chat.templates import CHAT_TEMPLATE_NAME, CHAT_TEMPLATES, template_jinja
from data.corpus import DataError
from data.tokenizer import Tokenizer, find_tokenizer_file
from model.config import ModelConfig
from model.hf.files import create_folder_atomically
from model.hf.names import (
    BIAS_SUFFIX,
    EMBEDDING,
    SCALE_SUFFIX,
    Stored,
    StoredDtype,
    copied_from,
    layer_of,
    stored_tensors,
    weights,
)
from model.hf.reader import TORCH_DTYPES, HfReader, all_finite
from model.hf.writer import Extras, Fp8Scales, rotary_plan, split_into_shards, write_hf
from train.checkpoint.index import (
    INDEX_NAME,
    PART_SUFFIX,
    PREFIXES,
    ROTARY_PREFIX,
    Index,
    IndexEntry,
    TensorPart,
    index_json,
)
from train.checkpoint.manifest import TOKENIZER_NAME, CheckpointError, write_weights_manifest
from train.checkpoint.parts import write_part
from train.checkpoint.preserved import (
    PreservedMetadata,
    read_preserved,
    server_files,
    without_unknown_templates,
)
from train.checkpoint.sources import (
    CheckpointReader,
    Conversion,
    held_weights,
    is_hf_folder,
    source_folder,
    unknown_notes,
)
from train.terminal import progress_text

ValueT = TypeVar("ValueT")
Say = Callable[[str], None]

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WEIGHTS = PREFIXES["trained"]
_WORDS: dict[str, StoredDtype] = {"bf16": "BF16", "float32": "F32", "fp8": "BF16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The opened source of a conversion; `tensor` reads by name and converts to a type."""

    config: ModelConfig
    folder: Path
    dtypes: Mapping[str, StoredDtype]
    scales: Mapping[str, Tensor]
    preserved: PreservedMetadata
    rotary: Mapping[str, Tensor]
    tensor: Callable[[str, torch.dtype], Tensor]

    def read(self, name: str) -> Tensor:
        """Reads a tensor without loss, in its stored type or, if it is FP8, in float32."""
        dtype = self.dtypes[name]
        return self.tensor(name, torch.float32 if dtype == "F8_E4M3" else TORCH_DTYPES[dtype])


def convert(conversion: Conversion, say: Say) -> str:
    """Writes the weights in another form, complete or not at all, and returns a line for people.

    Raises:
        CheckpointError, HfError: the weights cannot be read, or the destination is not empty or cannot be written.
    """
    source = _open(conversion)
    if unknown := unknown_notes(conversion.path):
        say(unknown)
    if not conversion.accept_template:
        files, left_out = without_unknown_templates(source.preserved.files)
        source = replace(source, preserved=replace(source.preserved, files=files))
        for name in left_out:
            say(f"{name}: its chat template is not known and left out; accept_template=true copies it")
    if conversion.target == "hf" and not source.config.is_released_routing:
        number = source.config.num_group_scores
        say(f"model.group_score_experts: is {number}; other programs add 2 scores of a group, and choose other experts")
    shards = _Shards(conversion, source, say)
    write = _write_checkpoint if conversion.target == "checkpoint" else _write_hf
    write(conversion, source, shards)
    written = sum(file.stat().st_size for file in conversion.folder.iterdir())
    return f"wrote {conversion.folder}, {bytes_text(written)}, from {shards.summary}"


def _open(conversion: Conversion) -> _Source:
    path = conversion.path
    drop_mtp = conversion.drop_mtp
    folder = source_folder(path, "path")
    preserved = read_preserved(path, "path")
    if is_hf_folder(path):
        reader = HfReader(folder, drop_mtp=drop_mtp)
        stored = reader.source()
        return _Source(
            config=reader.config,
            folder=folder,
            dtypes=stored.dtypes,
            scales=stored.scales,
            preserved=preserved,
            rotary=stored.rotary,
            tensor=reader.tensor,
        )
    checkpoint = CheckpointReader(folder, "path", conversion.weights)
    config = replace(checkpoint.config, mtp_depth=0) if drop_mtp else checkpoint.config
    shapes = {name: shape for name, shape in weights(config) if copied_from(name) is None}
    num_layers = config.num_layers + config.mtp_depth
    dtypes = checkpoint.dtypes
    stored_types = {name: dtypes[name] for name in held_weights(config)}

    def tensor(name: str, dtype: torch.dtype) -> Tensor:
        # Hugging Face's form also contains weights without elements.
        return checkpoint.tensor(name, dtype) if name in stored_types else torch.empty(shapes[name], dtype=dtype)

    return _Source(
        config=config,
        folder=folder,
        dtypes={name: stored_types.get(name, stored_types[EMBEDDING]) for name in shapes},
        scales={},
        preserved=preserved,
        rotary={name: values for name, values in preserved.rotary.items() if (layer_of(name) or 0) < num_layers},
        tensor=tensor,
    )


def _write_checkpoint(conversion: Conversion, source: _Source, shards: "_Shards") -> None:
    plan = {ROTARY_PREFIX + name: stored for name, stored in rotary_plan(source.rotary).items()}
    for name, shape in held_weights(source.config).items():
        dtype: StoredDtype = "BF16" if source.dtypes[name] == "F8_E4M3" else source.dtypes[name]
        if conversion.dtype is not None:
            dtype = _WORDS[conversion.dtype]
        plan[_WEIGHTS + name] = Stored(shape, "F32" if name.endswith(BIAS_SUFFIX) else dtype)

    def read_rounded(name: str) -> Tensor:
        if name.startswith(ROTARY_PREFIX):
            return source.rotary[name.removeprefix(ROTARY_PREFIX)]
        dtype = TORCH_DTYPES[plan[name].dtype]
        values = source.read(name.removeprefix(_WEIGHTS)).to(dtype)
        if not all_finite(values):
            subject = f"{conversion.folder}: {name.removeprefix(_WEIGHTS)}"
            raise CheckpointError(f"{subject}: must hold finite numbers in {dtype}, does not")
        return values

    named = {f"weights_{n:05}{PART_SUFFIX}": t for n, t in enumerate(split_into_shards(plan, conversion.file_bytes))}
    with create_folder_atomically(conversion.folder) as folder:
        jobs = [
            partial(write_part, folder, file, _entries_in(file, tensors), read_rounded)
            for file, tensors in named.items()
        ]
        parts = shards.run(jobs, [[name.removeprefix(_WEIGHTS) for name in tensors] for tensors in named.values()])
        files = {file: digest for file, (digest, _) in zip(named, parts, strict=True)}
        index = {name: entry for _, written in parts for name, entry in written.items()}
        others = {**source.preserved.files, **_tokenizer_file(source.folder), INDEX_NAME: index_json(index).encode()}
        for name, content in others.items():
            write_synced(folder / name, content)
        write_weights_manifest(folder, source.config, source.preserved.config, files)


def _entries_in(file: str, tensors: Mapping[str, Stored]) -> Index:
    return {name: IndexEntry(stored, (TensorPart(file, 0, stored.num_elements),)) for name, stored in tensors.items()}


def _write_hf(conversion: Conversion, source: _Source, shards: "_Shards") -> None:
    plan, scales = _plan_hf(conversion, source)
    plan |= rotary_plan(source.rotary)
    names = split_into_shards(plan, conversion.file_bytes)
    ids, files = _for_servers(source)
    template = _chat_template(conversion, source)
    write_hf(
        conversion.folder,
        source.config,
        plan,
        lambda name: source.rotary[name] if name in source.rotary else source.read(name),
        scales=scales,
        extras=Extras(
            config={**ids, **source.preserved.config},
            files={**files, **source.preserved.files, **_tokenizer_file(source.folder), **template},
        ),
        max_shard_bytes=conversion.file_bytes,
        run=lambda jobs: shards.run(jobs, names),
    )


def _plan_hf(conversion: Conversion, source: _Source) -> tuple[dict[str, Stored], Fp8Scales]:
    config = source.config
    quantization = source.preserved.config.get("quantization_config") or {}
    scales = Fp8Scales(by_name=source.scales, power_of_two=quantization.get("scale_fmt") == "ue8m0")
    if conversion.dtype is not None:
        return stored_tensors(config, dtype=_WORDS[conversion.dtype], fp8=conversion.dtype == "fp8"), scales
    plan = stored_tensors(config, dtype="BF16", fp8=bool(source.scales))
    source_types: dict[str, Stored] = {}
    for name, stored in plan.items():
        original = copied_from(name) or name
        if original in source.dtypes:
            source_types[name] = Stored(stored.shape, source.dtypes[original])
        elif original.removesuffix(SCALE_SUFFIX) in source.scales:
            source_types[name] = stored
    return source_types, scales


def _tokenizer_file(folder: Path) -> dict[str, bytes]:
    path = folder / TOKENIZER_NAME
    return {TOKENIZER_NAME: path.read_bytes()} if path.is_file() else {}


def _chat_template(conversion: Conversion, source: _Source) -> dict[str, bytes]:
    """Returns the file of the chosen chat template. The source's tokenizer must have its tokens."""
    name = conversion.chat_template
    if name is None:
        return {}
    if (path := find_tokenizer_file(source.folder)) is None:
        raise DataError(f"chat_template: must be null, as {source.folder} has no tokenizer, is {name}")
    template = CHAT_TEMPLATES.get(name)
    check_tokens(template.required_tokens, name, Tokenizer.load(path), "chat_template")
    return {CHAT_TEMPLATE_NAME: template_jinja(template).encode()}


def _for_servers(source: _Source) -> tuple[dict[str, int], dict[str, bytes]]:
    """Returns keys of `config.json` and files for inference servers, if the source has a tokenizer."""
    try:
        path = find_tokenizer_file(source.folder)
        if path is None:
            return {}, {}
        tokenizer = Tokenizer.load(path)
    except DataError:
        return {}, {}
    return server_files(tokenizer, source.config.max_position_tokens)


class _Shards:
    """The files of a conversion, written by several processes. Progress is printed after each file."""

    def __init__(self, conversion: Conversion, source: _Source, say: Say) -> None:
        shapes = held_weights(source.config)
        stored = {name: Stored(shape, source.dtypes[name]) for name, shape in shapes.items()}
        self._sizes = {name: item.num_elements * TORCH_DTYPES[item.dtype].itemsize for name, item in stored.items()}
        # The cores that a batch system gave this process, where the system states them.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._num_processes = conversion.processes or cores or 1
        self._say = say
        self._began = time.monotonic()
        self._num_tensors = 0
        self._num_bytes = 0
        self.summary = f"{len(self._sizes)} tensors, {bytes_text(sum(self._sizes.values()))}"

    def run(self, jobs: Sequence[Callable[[], ValueT]], shards: Sequence[Iterable[str]]) -> list[ValueT]:
        """Returns the result of each job, which writes the file of a shard with tensors of these names."""
        results: dict[int, ValueT] = {}
        # Closed before an error removes the folder, so that no process writes into it any more.
        with closing(run_in_processes(jobs, self._num_processes)) as finished:
            for index, result in finished:
                results[index] = result
                self._add(shards[index])
        return [results[index] for index in range(len(jobs))]

    def _add(self, names: Iterable[str]) -> None:
        sizes = [self._sizes[name] for name in names if name in self._sizes]
        self._num_tensors += len(sizes)
        self._num_bytes += sum(sizes)
        if self._num_tensors < len(self._sizes):
            how_far = progress_text(self._num_bytes, sum(self._sizes.values()), time.monotonic() - self._began)
            self._say(f"read {self._num_tensors} of {len(self._sizes)} tensors, {how_far}")


def run_in_processes(
    jobs: Sequence[Callable[[], ValueT]], num_processes: int
) -> Generator[tuple[int, ValueT], None, None]:
    """Yields the index and the result of each job as it ends, at most `num_processes` at a time.

    Each job runs in a fork of this process. An error of a job is raised here, and the other processes are ended. With
    one job or process, jobs run in turn here.
    """
    if min(num_processes, len(jobs)) <= 1:
        yield from ((index, job()) for index, job in enumerate(jobs))
        return
    context = multiprocessing.get_context("fork")
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                index, job = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_send_result, args=(job, theirs), daemon=True)
                with _signals_held():
                    process.start()
                theirs.close()
                running[ours] = index, process
            for ended in connection.wait(list(running)):
                assert isinstance(ended, Connection)
                index, process = running.pop(ended)
                yield index, _receive_result(ended, process)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Delays signals: Python ignores an exception that a handler raises while a process forks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send_result(job: Callable[[], object], result: Connection) -> None:
    for number in _ENDING:
        # Ctrl-C reaches all processes of a terminal; the one that started this one ends it.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    torch.set_num_threads(1)
    try:
        result.send((job(), None))
    except Exception as error:
        result.send((None, error))


def _receive_result(result: Connection, process: ForkProcess) -> Any:
    try:
        value, error = result.recv()
    except EOFError:
        process.join()
        raise CheckpointError(f"a process that wrote weights died with exit code {process.exitcode}") from None
    process.join()
    if error is not None:
        raise error
    return value

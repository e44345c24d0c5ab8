"""Writes a training step that other trainers can compare themselves with: `python -m launch.golden`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base.decode import decode
from base.figures import bytes_text
from base.refusal import ConfigError
from launch import unwound_by_signals
from launch.cli.entry import check_new_folder, command, preview_of
from launch.config.compose import compose, system_errors
from launch.weights.job import local_cluster, run_on_local_ranks
from model.hf.checkpoint import lay_out
from model.hf.files import create_folder_atomically
from model.hf.names import Stored, StoredDtype
from verify.golden.config import GoldenConfig, GoldenRun, Precision, Size, read_golden

NAME = "golden"
CHECKER = "check.py"
_ROOT = Path(__file__).resolve().parents[1]
_GOLDEN = _ROOT / "verify" / "golden"
_COPIES = {
    "README.md": _GOLDEN / "readme.md",
    CHECKER: _GOLDEN / "check.py",
    "LICENSE": _ROOT / "LICENSE",
}
_DTYPES: dict[str, StoredDtype] = {"float64": "F64", "float32": "F32", "int64": "I64"}
# Of an axis, step 1 has no updated weights and step 2 no gradients: each depends on the other.
_LEFT_OUT = {1: ("weight/", "exp_avg", "average/"), 2: ("gradient/", "exp_avg", "average/")}
# In bf16 the gradients and second steps of correct trainers differ too much, because tokens choose other experts.
_LEFT_OUT_OF_BF16 = ("gradient/", "exp_avg", "weight/")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenFolderConfig:
    """Configuration of the command; see `conf/golden.yaml`."""

    out: str
    precisions: tuple[Precision, ...]
    size: Size


def main(overrides: Sequence[str]) -> int:
    """Runs the step on local ranks and writes the folder. After an error or a signal, nothing is left."""
    config = _read(overrides)
    out = Path(config.out).expanduser()
    with system_errors(), unwound_by_signals(), create_folder_atomically(out) as folder:
        _write(folder, config)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {bytes_text(num_bytes)}; to compare results: python {out / CHECKER} RESULTS")
    return 0


def _read(overrides: Sequence[str]) -> GoldenFolderConfig:
    config = decode(GoldenFolderConfig, compose(NAME, overrides))
    chosen = config.precisions
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"precisions: must name at least one, each once, is {list(chosen)}; nearest valid: [float64]")
    if config.size == "fused" and "fp8" in chosen:
        rule = "fp8 needs size=small, because among more numbers some always cross a rounding tie"
        raise ConfigError(f"precisions: {rule}, is {list(chosen)}; nearest valid: [float64,float32,bf16]")
    check_new_folder("out", config.out)
    return config


def _write(folder: Path, config: GoldenFolderConfig) -> None:
    precisions = config.precisions
    golden, values = read_golden(config.size)
    plain: dict[str, GoldenRun] = {precision: golden.plain_run(precision) for precision in precisions}
    axes = golden.axes if "float64" in precisions else {}
    scratch = folder / "scratch"
    scratch.mkdir()
    _say(f"running {golden.task.steps} steps in {', '.join(plain)}; axes: {', '.join(axes) or 'none'}")
    _record(golden, {**plain, **axes}, scratch)
    order: dict[str, int] = {}
    for name in (*plain, *axes):
        place = folder / (name if name in plain else f"axes/{name}")
        place.mkdir(parents=True)
        for step in range(1, 1 + (1 if name == "bf16" else golden.task.steps)):
            arrays = _merge([_load(path) for path in sorted(scratch.glob(f"{name}-{step}-*.npz"))])
            # Ranks hold parts of a step, so the order is that of one rank with all of it.
            order = order or {key: number for number, key in enumerate(arrays)}
            left_out = _LEFT_OUT[step] if name in axes else _LEFT_OUT_OF_BF16 if name == "bf16" else ()
            keys = sorted(
                (key for key in arrays if not key.startswith(left_out)), key=lambda key: order.get(key, 10**6)
            )
            wide = name if name in ("float64", "float32") else "float64" if name in axes else "float32"
            typed = {key: arrays[key].astype(wide) if arrays[key].dtype == "float64" else arrays[key] for key in keys}
            _write_arrays(place / f"step_{step}.safetensors", typed)
    _write_arrays(folder / "batch.safetensors", _load(scratch / "batch.npz"))
    (scratch / "model").rename(folder / "model")
    shutil.rmtree(scratch)
    for name, source in _COPIES.items():
        shutil.copyfile(source, folder / name)
    del values["model"]  # config.json has it
    (folder / "settings.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [f"{sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _record(golden: GoldenConfig, runs: Mapping[str, GoldenRun], scratch: Path) -> None:
    """Makes the runs. Those with equally many ranks share processes; a single rank makes the inputs."""
    from verify.golden.record import record_runs

    def report(name: str, losses: Sequence[float], norm: float) -> None:
        _say(f"{name}: loss {', '.join(f'{loss:.6f}' for loss in losses)}; norm of the first gradient {norm:.6f}")

    for num_ranks in sorted({run.parallelism.world_size for run in runs.values()}):
        # One thread, so that sums have one order.
        cluster = replace(local_cluster("cpu", num_ranks), threads_per_rank=1)
        alike = {name: run for name, run in runs.items() if run.parallelism.world_size == num_ranks}
        function = partial(record_runs, golden, alike, scratch, cluster)
        run_on_local_ranks(function, cluster, num_ranks, ["verify.golden.record"], report)


def _load(path: Path) -> Arrays:
    with np.load(path) as arrays:
        return dict(arrays)


def _merge(parts: Sequence[Arrays]) -> Arrays:
    """Joins what the ranks hold; if several hold a number, it must be the same to the bit."""
    merged: Arrays = {}
    for name, array in (item for part in parts for item in part.items()):
        first = merged.setdefault(name, array)
        # What a rank does not hold is NaN, or -1 among experts.
        is_absent, is_new = (
            np.isnan(values) | ((values == -1) & (values.dtype == "int64")) for values in (first, array)
        )
        is_shared = ~is_absent & ~is_new
        assert np.array_equal(first[is_shared], array[is_shared]), f"ranks differ in {name}"
        merged[name] = np.where(is_absent, array, first)
    return merged


def _write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes a safetensors file with a header in the order of the arrays."""
    plan = {name: Stored(array.shape, _DTYPES[array.dtype.name]) for name, array in arrays.items()}
    offsets, header = lay_out(plan, keeps_order=True)
    with path.open("xb") as file:
        file.write(header)
        for name, array in arrays.items():
            file.seek(offsets[name])
            file.write(array.tobytes())


preview = preview_of(NAME, _read)

if __name__ == "__main__":
    sys.exit(command(NAME, main, preview))

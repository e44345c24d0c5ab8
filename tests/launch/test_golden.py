"""The golden folder: two readers that know its README agree with it, and its checker names planted errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from base.refusal import ConfigError
from launch.golden import main
from tests import ROOT
from tests.commands import StartedCommand, run_command
from tests.docs.test_blocks import run_page
from tests.launch.golden_reader import Reader, write
from tests.refusals import assert_refused
from verify.golden.config import read_golden

CHECKER = ROOT / "verify" / "golden" / "check.py"
GATE = "model.layers.1.mlp.gate.e_score_correction_bias"
FAULTS = {
    "rotates halves": "attention/layers.0",
    "eps of the model in latents": "attention/layers.0",
    "rotation without its factor": "attention/layers.0",
    "ignores groups": "router_experts/layers.1",
    "sums whole groups": "router_experts/layers.1",
    "does not scale weights": "router_weights/layers.1",
    "averages micro-batches": "loss/main",
    "wrong weight of MTP": "loss/total",
    "forgets balance": "loss/total",
    "balance without gradient": "gradient/model.layers.2.mlp.gate.weight",
    "does not clip": "exp_avg/model.embed_tokens.weight",
    "moments without correction": "weight/model.embed_tokens.weight",
    "decays norms": "weight/model.layers.0.input_layernorm.weight",
    "turns the bias": f"weight/{GATE}",
    "swaps the average": "average/model.embed_tokens.weight",
}
"""The planted errors, and the first tensor in the order of execution that each of them changes."""


def check(folder: Path, results: Path, *sections: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-I", folder / "check.py", results, *sections], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def first_difference(output: str) -> str:
    match = re.search(r"first ([a-z0-9_]+/[^\[:\s]+|gradient_norm)", output)
    assert match is not None, output
    return match[1]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "made"
    done = run_command(["python", "-m", "launch.golden", f"out={folder}"])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "fused"
    precisions = "precisions=[float64,float32,bf16]"
    done = run_command(["python", "-m", "launch.golden", f"out={folder}", "size=fused", precisions])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["out=full"], ["out: ", "not empty"]),
        (["out=full/note.txt"], ["out: ", "a file"]),
        (["out=new", "precisions=[float16]"], ["precisions", "float64, float32, bf16, fp8", "float16"]),
        (["out=new", "size=large"], ["size", "small, fused", "large"]),
        (["out=new", "size=fused"], ["precisions: fp8 needs size=small", "nearest valid: [float64,float32,bf16]"]),
        (["out=new", "precisions=[]"], ["precisions", "nearest valid"]),
        (["out=new", "precisions=[fp8,fp8]"], ["precisions", "once"]),
        ([], ["out"]),
    ],
)
def test_golden_bad_input_is_refused_and_nothing_written(
    arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").touch()
    assert_refused(ConfigError, parts, lambda: main(arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_golden_batches_hide_uneven_numbers_of_targets() -> None:
    """A mean of means must differ from the mean, between micro-batches and between ranks."""
    from verify.golden.record import make_batch

    config, _ = read_golden()
    for step in range(config.task.steps):
        counts = make_batch(config, step).extras["weights"][:, :-1].sum(1)
        for parts in (4, 2):
            sums = counts.view(parts, -1).sum(1)
            assert len(sums.unique()) == parts, sums


SCALE = [
    ("NaN", lambda array: np.full_like(array, np.nan), "weight/b"),
    ("small", lambda array: array * (1 + 1e-8), "weight/b"),
    ("shape", lambda array: array[:1], "must have [2, 3]"),
    ("unknown", None, "1 are unknown, first weight/new"),
    ("missing", None, "1 are missing, first weight/b"),
]


@pytest.mark.parametrize(("kind", "change", "text"), SCALE, ids=[case[0] for case in SCALE])
def test_golden_checker_names_the_first_difference(
    kind: str, change: Callable[[np.ndarray], np.ndarray] | None, text: str, tmp_path: Path
) -> None:
    reference, results = tmp_path / "reference", tmp_path / "results"
    (reference / "float64").mkdir(parents=True)
    shutil.copy(CHECKER, reference / "check.py")
    arrays = {"weight/a": np.ones(2), "weight/b": np.ones((2, 3)), "weight/c": np.arange(3), "rank_0/load": np.ones(1)}
    save_file(arrays, reference / "float64" / "step_1.safetensors")
    assert check(reference, results)[0] == 2
    (results / "float64").mkdir(parents=True)
    theirs = dict(arrays)
    if change is not None:
        theirs["weight/b"] = np.ascontiguousarray(change(arrays["weight/b"]))
    elif kind == "unknown":
        theirs["weight/new"] = np.ones(1)
    else:
        del theirs["weight/b"], theirs["rank_0/load"]
    save_file(theirs, results / "float64" / "step_1.safetensors")
    code, output = check(reference, results)
    assert (code, text in output) == (1, True), output
    assert check(reference, results, "weight/a", "rank_")[0] == 0
    assert check(reference, results, "weights/")[0] == 2
    (results / "float64" / "step_1.safetensors").write_bytes(b"no safetensors")
    assert check(reference, results)[0] == 2


def test_golden_checker_reads_bf16_and_compares_it_as_such(tmp_path: Path) -> None:
    reference, results = tmp_path / "reference", tmp_path / "results"
    exact = {"loss/main": np.array([1.5], "<f4"), "attention/a": np.array([[-3.25, 1024.0], [0.0, 2.0**-20]], "<f4")}
    for folder, change in ((reference, 1.0), (results, 1.0 + 2.0**-7)):
        (folder / "bf16").mkdir(parents=True)
        (folder / "float32").mkdir()
        save_file(exact, folder / "float32" / "step_1.safetensors")
        arrays = {"loss/main": exact["loss/main"], "attention/a": np.float32(change) * exact["attention/a"]}
        tensors = {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}
        save_tensors(tensors, folder / "bf16" / "step_1.safetensors")
    shutil.copy(CHECKER, reference / "check.py")
    code, output = check(reference, results)
    assert code == 0, output
    assert re.search(r"bf16/step_1.safetensors: 2 tensors, largest error within tolerance 0.007\d", output), output
    # A bf16 file of a trainer in float32 must have its precision.
    shutil.copy(results / "bf16" / "step_1.safetensors", results / "float32" / "step_1.safetensors")
    code, output = check(reference, results)
    assert (code, "1 of 2 files differ, first float32/step_1" in output) == (1, True), output


def test_golden_checker_counts_further_results_of_an_axis_and_misses_wrong_names(tmp_path: Path) -> None:
    reference, results = tmp_path / "reference", tmp_path / "results"
    for name in ("axes/expert", "bf16", "float64"):
        for folder in (reference, results):
            (folder / name).mkdir(parents=True)
            arrays = {"loss/main": np.ones(1, "<f4"), "rank_0/load": np.ones(1, "<f4")}
            arrays |= {"weight/a": np.ones(2, "<f4"), "weight/b": np.ones(2, "<f4")} if folder == results else {}
            save_file(arrays, folder / name / "step_1.safetensors")
    shutil.copy(CHECKER, reference / "check.py")
    code, output = check(reference, results)
    assert code == 1
    assert "1 of 3 files differ, first float64/step_1" in output, output
    assert output.count("2 are not compared, first weight/a") == 2, output
    assert output.count("2 are unknown, first weight/a") == 1, output
    shutil.rmtree(results / "float64")
    assert check(reference, results)[0] == 0
    save_file({"loss/mean": np.ones(1, "<f4")}, results / "axes" / "expert" / "step_1.safetensors")
    code, output = check(reference, results)
    assert (code, "1 are missing, first loss/main" in output) == (1, True), output


def test_golden_checker_has_at_most_90_lines_and_imports_numpy_alone() -> None:
    lines = CHECKER.read_text("utf-8").splitlines()
    assert len(lines) <= 90
    imports = {line.split()[1] for line in lines if re.match("(import|from) ", line)}
    assert imports == {"json", "sys", "pathlib", "typing", "numpy"}


def test_golden_names_of_other_trainers_cover_all_parameters() -> None:
    from model.hf.names import stored_tensors

    page = (
        (ROOT / "verify" / "golden" / "readme.md").read_text("utf-8").partition("## Names in")[2].partition("\n## ")[0]
    )
    rows = [row.split("|")[1:4] for row in page.splitlines() if row.startswith("| `")]
    assert all(len(re.findall("`", cell)) >= 2 for row in rows for cell in row)
    listed = {name.replace(".E.", ".0.") for row in rows for name in re.findall("`(.+?)`", row[0])}
    config, _ = read_golden()
    copies = ("2.embed_tokens.weight", "2.shared_head.head.weight")  # the main embedding and head
    for name in stored_tensors(config.model, dtype="F32", fp8=False):
        plain = re.sub(r"experts\.\d+\.", "experts.0.", name)
        stem = re.sub(r"^model\.layers\.\d+\.", "", plain)
        assert {plain, stem} & listed or name.endswith(copies), name


@pytest.mark.long
def test_golden_axes_equal_one_rank_and_differ_only_where_they_must(golden: Path) -> None:
    """The losses of ranks add up to the whole, and so do their tokens; a fault of an axis is named with it."""
    plain = [load_file(golden / "float64" / f"step_{step}.safetensors") for step in (1, 2)]
    names = sorted(path.name for path in (golden / "axes").iterdir())
    assert names == ["context", "data", "expert", "micro_batches", "pipeline"]
    for name in names:
        for step, expected in enumerate(plain, start=1):
            seen = load_file(golden / "axes" / name / f"step_{step}.safetensors")
            ranks = {key: array for key, array in seen.items() if key.startswith("rank_")}
            for key in seen.keys() - ranks.keys():
                assert np.linalg.norm(seen[key] - expected[key]) <= 1e-10 * np.linalg.norm(expected[key]), (name, key)
            assert {key.split("/")[0] for key in seen} >= {"gradient" if step == 1 else "weight", "token_loss", "loss"}
            sums = sum(array for key, array in ranks.items() if key.endswith("loss_sum/main"))
            assert float(sums) == pytest.approx(float(expected["token_loss/main"].sum()), rel=1e-12)
            loads = sum(array for key, array in ranks.items() if key.endswith("load/layers.1"))
            assert np.array_equal(loads, np.bincount(expected["router_experts/layers.1"].flatten(), minlength=16))
    counts = {key: array for key, array in seen.items() if key.endswith("load/layers.1")}
    assert len(counts) == 2


@pytest.mark.long
def test_golden_fault_of_an_axis_is_named_with_it(golden: Path, tmp_path: Path) -> None:
    for name in ("float64", "axes"):
        shutil.copytree(golden / name, tmp_path / name)
    path = tmp_path / "axes" / "expert" / "step_1.safetensors"
    arrays = load_file(path)
    broken = "gradient/model.layers.1.mlp.experts.5.up_proj.weight"
    save_file({**arrays, broken: 2 * arrays[broken]}, path)
    code, output = check(golden, tmp_path)
    assert code == 1
    assert "1 of 12 files differ, first axes/expert/step_1.safetensors" in output
    assert first_difference(output) == broken


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float64", "float32", "fp8"])
def test_golden_reader_of_the_formulas_passes(precision: str, golden: Path, tmp_path: Path) -> None:
    reader = Reader(golden, precision)
    for step in (1, 2):
        write(tmp_path / precision, step, reader.step(step), reader.dtype)
    code, output = check(golden, tmp_path)
    assert (code, "0 of 2 files differ" in output) == (0, True), output


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_golden_reader_of_the_formulas_passes_at_the_size_of_fused_kernels(
    precision: str, fused: Path, tmp_path: Path
) -> None:
    keys = json.loads((fused / "model" / "config.json").read_text())
    widths = ("hidden_size", "moe_intermediate_size", "intermediate_size", "q_lora_rank", "kv_lora_rank", "vocab_size")
    assert all(keys[key] % 128 == 0 for key in widths)
    assert (keys["qk_nope_head_dim"], keys["qk_rope_head_dim"], keys["v_head_dim"]) == (128, 64, 128)
    test_golden_reader_of_the_formulas_passes(precision, fused, tmp_path)


@pytest.mark.long
def test_golden_reader_of_transformers_passes_in_bf16_and_gross_errors_do_not(
    golden: Path, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.launch.golden_transformers import TransformersReader

    for folder in (fused, golden):
        reader = TransformersReader(folder, "bfloat16", monkeypatch)
        write(tmp_path / "bf16", 1, reader.step(1), reader.dtype)
        code, output = check(folder, tmp_path)
        assert (code, "0 of 1 files differ" in output) == (0, True), output
        assert output.count("are not compared, first ") == 1, output
    for fault in ("rotates halves", "ignores groups", "does not scale weights", "wrong weight of MTP"):
        broken = Reader(golden, "float32", fault)
        write(tmp_path / "bf16", 1, broken.step(1), torch.bfloat16)
        code, output = check(golden, tmp_path)
        assert code == 1, (fault, output)
        assert first_difference(output) == FAULTS[fault], output


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_golden_reader_of_transformers_passes(
    precision: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.launch.golden_transformers import TransformersReader

    reader = TransformersReader(golden, precision, monkeypatch)
    for step in (1, 2):
        write(tmp_path / precision, step, reader.step(step), reader.dtype)
    code, output = check(golden, tmp_path)
    assert (code, "0 of 2 files differ" in output) == (0, True), output


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_golden_planted_error_is_named_at_the_right_tensor(fault: str, golden: Path, tmp_path: Path) -> None:
    reader = Reader(golden, "float64", fault)
    write(tmp_path / "float64", 1, reader.step(1), torch.float64)
    code, output = check(golden, tmp_path)
    assert code == 1
    assert first_difference(output) == FAULTS[fault], output


@pytest.mark.long
def test_golden_fp8_differs_from_float32(golden: Path, tmp_path: Path) -> None:
    reader = Reader(golden, "float32")
    write(tmp_path / "fp8", 1, reader.step(1), torch.float32)
    code, output = check(golden, tmp_path, "gradient/")
    assert code == 1
    differing, tensors = re.findall(r"(\d+) differ", output)[0], re.findall(r": (\d+) tensors", output)[0]
    assert int(differing) > 0.9 * int(tensors)


@pytest.mark.long
def test_golden_second_run_that_of_the_page_has_the_same_bytes(golden: Path, tmp_path: Path) -> None:
    run_page(ROOT / "docs" / "golden.md", tmp_path, tmp_path / "trained")
    sums = [(folder / "SHA256SUMS").read_text() for folder in (golden, tmp_path / "golden")]
    assert sums[0] == sums[1]
    for line in sums[0].splitlines():
        digest, name = line.split("  ")
        assert sha256((golden / name).read_bytes()).hexdigest() == digest
    assert sum(path.stat().st_size for path in golden.rglob("*")) < 10e6
    assert "Apache License" in (golden / "LICENSE").read_text()
    assert json.loads((golden / "settings.json").read_text())["optim"]["clip_norm"] == 0.5


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_golden_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    started = StartedCommand(["python", "-m", "launch.golden", f"out={tmp_path / 'made'}", "precisions=[float64]"])
    while not list(tmp_path.glob(".made.*/scratch/batch.npz")):
        time.sleep(0.05)
    os.kill(started.pid, number)
    assert started.wait(60).returncode == 128 + number
    assert list(tmp_path.iterdir()) == []

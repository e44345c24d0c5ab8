"""Parts of a checkpoint are read in runs of rows, and shards are written as safetensors reads them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import model.hf.reader
from comm.dispatch.local import LocalDispatcher
from model.config import MlaConfig
from model.hf.checkpoint import read_header
from model.hf.files import HfError
from model.hf.names import copied_from, is_quantized, scale_name, stored_tensors, weights
from model.hf.reader import HfReader
from model.hf.writer import Extras, Fp8Scales, write_hf
from model.pretrained import save_hf
from model.transformer import Part, Transformer, initialize_weights, named_tensors
from tests.model.hf_checkpoints import (
    FP8_CONFIG,
    dequantized,
    read_tensors,
    reference_model,
    save_checkpoint,
    write_tensors,
)
from tests.test_floors import ROOT
from tests.tiny import MODEL

RAGGED: dict[str, Any] = {"hidden_size": 136, "kv_lora_rank": 184, "intermediate_size": 700, "vocab_size": 300}
COPY, NORM = "model.layers.3.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Returns a checkpoint in FP8 whose scales and weights are in different files, and its weights in float32."""
    folder = tmp_path_factory.mktemp("fp8")
    return folder, dequantized(save_checkpoint(folder, fp8=True, num_files=3, **RAGGED))


@pytest.mark.parametrize(("dtype", "chunk_bytes"), [(torch.float32, 1), (torch.bfloat16, 5000), (torch.float32, 2**24)])
def test_every_run_of_rows_gives_the_same_weights(
    dtype: torch.dtype, chunk_bytes: int, fp8: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = fp8
    monkeypatch.setattr(model.hf.reader, "CHUNK_BYTES", chunk_bytes)
    reader = HfReader(folder)
    named = {name: torch.full(tensor.shape, torch.nan, dtype=dtype) for name, tensor in expected.items()}
    reader.fill(named)
    for name, tensor in named.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name


@pytest.mark.parametrize(
    ("part", "first", "last"),
    [
        (Part(layers=(0, 1), experts=range(0, 4), embedding=True, head=False), True, False),
        (Part(layers=(2, 3), experts=range(4, 8), embedding=True, head=True), True, True),
        (Part(layers=(1,), experts=range(2, 3), embedding=False, head=False), False, False),
    ],
    ids=["first", "last with MTP", "middle"],
)
def test_a_rank_fills_what_it_holds(part: Part, first: bool, last: bool, fp8: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = fp8
    reader = HfReader(folder)
    held = Transformer(reader.config, LocalDispatcher(len(part.experts)), torch.float32, part)
    named = named_tensors(held)
    for tensor in named.values():
        tensor.fill_(torch.nan)
    reader.fill(named)
    for name, tensor in named.items():
        assert torch.equal(tensor, expected[name]), name
    assert ("model.embed_tokens.weight" in named, "lm_head.weight" in named) == (first, last)


def test_names_and_shapes_that_the_checkpoint_lacks_are_rejected(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    reader = HfReader(fp8[0])
    with pytest.raises(HfError, match=r"model.nrm.weight: must be in the checkpoint, is not; nearest: model.norm"):
        reader.fill({"model.nrm.weight": torch.empty(136)})
    with pytest.raises(HfError, match=r"model.norm.weight: must have shape \[7\], has \[136\]"):
        reader.fill({NORM: torch.empty(7)})
    with pytest.raises(HfError, match=r"model.layers.9.enorm.weight: must be in the checkpoint"):
        reader.tensor("model.layers.9.enorm.weight", torch.float32)


def test_a_copy_is_compared_only_if_its_original_is_read(tmp_path: Path) -> None:
    tensors = save_checkpoint(tmp_path)
    tensors[COPY][47, 23] += 1e-3
    write_tensors(tmp_path, tensors, num_files=2)
    reader = HfReader(tmp_path)
    reader.tensor("lm_head.weight", torch.float32)
    reader.tensor("model.layers.3.eh_proj.weight", torch.float32)
    with pytest.raises(HfError, match=f"{COPY}: must equal model.embed_tokens.weight byte for byte, differs"):
        reader.tensor("model.embed_tokens.weight", torch.float32)


def test_a_file_that_shrinks_after_it_was_checked_is_named(tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path)
    reader, file = HfReader(tmp_path), tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    names = sorted(read_tensors_of_header(reader), key=lambda name: reader.checkpoint.entries[name].offset)
    with pytest.raises(HfError, match=f"{names[-1]}: must have 96 bytes, file ends early"):
        reader.tensor(names[-1], torch.float32)
    file.unlink()
    with pytest.raises(HfError, match=r"model.safetensors: must be readable, is not \(No such file"):
        reader.tensor(names[0], torch.float32)


def read_tensors_of_header(reader: HfReader) -> list[str]:
    return list(reader.checkpoint.entries)


def test_source_tells_every_type_and_scale(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = fp8
    source, tensors = HfReader(folder).source(), read_tensors(folder)
    words = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    assert source.dtypes == {name: words[tensor.dtype] for name, tensor in tensors.items()}
    assert source.scales.keys() == {name for name in tensors if is_quantized(name)}
    for name, scales in source.scales.items():
        assert torch.equal(scales, tensors[f"{name}_scale_inv"])
    assert source.config["quantization_config"] == FP8_CONFIG


def test_a_checkpoint_is_checked_without_torch(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    """So that a command can refuse a wrong one before it starts any process."""
    code = f"""
import sys
from pathlib import Path
from model.hf.checkpoint import open_checkpoint
print(open_checkpoint(Path({str(fp8[0])!r})).config.num_layers, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "False"]


WRITER_NORM = "model.norm.weight"

# Sizes that leave FP8 weights of an odd number of bytes.
ODD = replace(MODEL, hidden_size=33, q_lora_rank=15)


def random_model(config: MlaConfig = MODEL) -> Transformer:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    initialize_weights(model, 0)
    return model


def test_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    limit = 20_000
    save_hf(random_model(ODD), tmp_path / "out", "fp8", max_shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    plan, total = stored_tensors(ODD, dtype="BF16", fp8=True), 0
    seen: set[str] = set()
    sizes: list[int] = []
    for file in files:
        entries = read_header(file)
        seen |= entries.keys()
        size = sum(entry.num_bytes for entry in entries.values())
        weights_here = [name for name in entries if not name.endswith("_scale_inv")]
        assert size <= limit or len(weights_here) == 1
        total += size
        sizes.append(size)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == entries.keys()
            for name, entry in entries.items():
                assert index["weight_map"][name] == file.name
                assert tuple(opened.get_slice(name).get_shape()) == plan[name].shape
                assert entry.offset % {"F32": 4, "BF16": 2, "F8_E4M3": 1}[entry.dtype] == 0
                if entry.dtype == "F8_E4M3":
                    assert scale_name(name) in entries
    assert seen == plan.keys() == index["weight_map"].keys()
    assert all(sum(pair) > limit for pair in pairwise(sizes)), "two files that fit in one"
    assert total == index["metadata"]["total_size"]


def test_every_weight_is_asked_for_once_and_copies_follow(tmp_path: Path) -> None:
    named, asked = named_tensors(random_model()), []

    def tensor(name: str) -> Tensor:
        asked.append(name)
        return named[name]

    write_hf(tmp_path / "out", MODEL, stored_tensors(MODEL, dtype="F32", fp8=False), tensor, max_shard_bytes=10_000)
    assert asked == [copied_from(name) or name for name, _ in weights(MODEL)]
    written = read_tensors(tmp_path / "out")
    for name, stored in written.items():
        assert torch.equal(stored, named[copied_from(name) or name]), name


@pytest.mark.slow
def test_known_scales_are_kept_and_the_others_are_made(tmp_path: Path) -> None:
    named = named_tensors(random_model())
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1, 2)]
    known = {names[0]: torch.tensor([[0.125]]), names[1]: torch.tensor([[3.0]])}
    plan = stored_tensors(MODEL, dtype="BF16", fp8=True)
    scales = Fp8Scales(by_name=known, power_of_two=False)
    write_hf(tmp_path / "out", MODEL, plan, lambda name: named[name], scales=scales)
    written = read_tensors(tmp_path / "out")
    for name in names:
        scale = written[scale_name(name)]
        assert torch.equal(scale, known.get(name, named[name].abs().amax().view(1, 1) / 448))
        expected = (named[name] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(written[name].view(torch.uint8), expected.view(torch.uint8))


def test_files_are_on_the_disk_before_the_folder_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(handle: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    save_hf(random_model(), tmp_path / "out", max_shard_bytes=50_000)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {Path(path).name for path in before[:-1]} == files
    assert Path(before[-1]).name.endswith(".partial")
    assert after == [str(tmp_path)]


def test_extra_files_and_keys_are_written_next_to_the_weights(tmp_path: Path) -> None:
    named = named_tensors(random_model())
    plan = stored_tensors(MODEL, dtype="BF16", fp8=False)
    extras = Extras(config={"bos_token_id": 7}, files={"tokenizer.json": b"{}"})
    write_hf(tmp_path / "a" / "b" / "out", MODEL, plan, lambda name: named[name], extras=extras)
    made = {path.name for path in (tmp_path / "a" / "b" / "out").iterdir()}
    assert made == {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "a" / "b" / "out" / "config.json").read_text())["bos_token_id"] == 7


@pytest.mark.parametrize(
    ("error", "number", "has_destination"),
    [
        (RuntimeError("stop"), 0, False),
        (KeyboardInterrupt(), 40, True),
        (OSError(28, "No space left on device"), 100, False),
    ],
)
def test_nothing_is_left_of_what_fails(
    error: BaseException, number: int, has_destination: bool, tmp_path: Path
) -> None:
    named, asked = named_tensors(random_model()), iter(range(10**6))

    def tensor(name: str) -> Tensor:
        if next(asked) == number:
            raise error
        return named[name]

    if has_destination:
        (tmp_path / "a" / "b" / "out").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    plan = stored_tensors(MODEL, dtype="F32", fp8=False)
    expected = HfError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_hf(tmp_path / "a" / "b" / "out", MODEL, plan, tensor, max_shard_bytes=10_000)
    assert isinstance(error, OSError) == ("must be writable, is not (No space left on device)" in str(caught.value))
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_paths_are_rejected_and_unchanged(tmp_path: Path) -> None:
    model = random_model()
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "kept").write_text("kept")
    file.write_text("kept")
    with pytest.raises(HfError, match=r"full: must be absent or an empty folder, is not empty$"):
        save_hf(model, full)
    with pytest.raises(HfError, match=r"file: must be absent or an empty folder, is a file$"):
        save_hf(model, file)
    with pytest.raises(HfError, match=r"out: must be writable, is not \(Not a directory\)$"):
        save_hf(model, file / "out")
    assert (full / "kept").read_text() == file.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "kept"]


@pytest.mark.covering(1)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [WRITER_NORM, "model.layers.2.mlp.experts.3.up_proj.weight"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "fp8"])
def test_a_value_that_is_not_finite_is_named_and_nothing_is_left(
    value: float, name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = random_model()
    named_tensors(model)[name].view(-1)[5] = value
    with pytest.raises(HfError, match=f"^{tmp_path}/out/model.safetensors: {name}: must hold finite numbers"):
        save_hf(model, tmp_path / "out", dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    model = random_model()
    named_tensors(model)[WRITER_NORM][0] = 1e6
    with pytest.raises(HfError, match=f"{WRITER_NORM}: must hold finite numbers in F16"):
        save_hf(model, tmp_path / "out", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_model_is_rejected(tmp_path: Path) -> None:
    part = Part(layers=(0, 1), experts=range(8), embedding=True, head=False)
    model = Transformer(MODEL, LocalDispatcher(8), torch.float32, part)
    with pytest.raises(HfError, match=r"layers.2.input_layernorm.weight: must be in the model that is written"):
        save_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""Reading parts of a checkpoint: what is given is filled, in runs of rows, and nothing else is looked at."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.hf.reader
from comm.dispatch.local import LocalDispatcher
from model.hf.files import HfError
from model.hf.names import is_quantized
from model.hf.reader import HfReader
from model.transformer import Part, Transformer, named_tensors
from tests.model.hf_checkpoints import (
    FP8_CONFIG,
    dequantized,
    mtp_tensors,
    read_tensors,
    reference_model,
    save_checkpoint,
    write_tensors,
)
from tests.test_floors import ROOT

RAGGED: dict[str, Any] = {"hidden_size": 136, "kv_lora_rank": 184, "intermediate_size": 700, "vocab_size": 300}
COPY, NORM = "model.layers.3.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Returns a checkpoint in FP8 whose scales and weights are in different files, and its weights in float32."""
    folder = tmp_path_factory.mktemp("fp8")
    return folder, dequantized(save_checkpoint(folder, fp8=True, num_files=3, **RAGGED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**24])
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


def test_one_weight_is_read_by_name(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = fp8
    reader = HfReader(folder)
    for name in (NORM, COPY, "model.layers.1.mlp.experts.3.down_proj.weight"):
        made = reader.tensor(name, torch.float64)
        assert made.dtype == torch.float64
        assert torch.equal(made, expected[name].double())


def test_a_weight_that_lies_apart_in_memory_is_filled(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = fp8
    name = "model.layers.0.mlp.up_proj.weight"
    wide = torch.zeros(136, 1400).T[::2]
    HfReader(folder).fill({name: wide})
    assert torch.equal(wide, expected[name])


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


def test_mtp_modules_count_only_if_files_hold_them(tmp_path: Path) -> None:
    reference_model(num_nextn_predict_layers=2).save_pretrained(tmp_path)
    assert HfReader(tmp_path).config.mtp_depth == 0
    write_tensors(tmp_path, read_tensors(tmp_path) | mtp_tensors(tmp_path, depth=2))
    assert HfReader(tmp_path).config.mtp_depth == 2


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

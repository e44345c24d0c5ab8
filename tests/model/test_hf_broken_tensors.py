"""Broken tensors: each ends in one error of one line that names the file, the tensor and what is wrong."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import model.hf.reader
from model.hf.convert import load_hf
from model.hf.files import HfError
from tests.model.hf_checkpoints import edit_json
from tests.model.hf_damage import (
    CONFIG,
    COPY,
    EXPERT,
    FIRST,
    GATE,
    NORM,
    SCALED,
    SECOND,
    Damage,
    assert_refused,
    copy_into_second,
    damaged,
    edit_tensors,
    put,
    rename_expert,
    replace,
    sound_checkpoint,
)

CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(NORM)), (NORM, "is missing")),
    "missing bias": (
        edit_tensors(lambda tensors: tensors.pop("model.layers.0.mlp.gate.e_score_correction_bias")),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "is missing"),
    ),
    "one of the MTP module's tensors is missing": (
        edit_tensors(lambda tensors: tensors.pop("model.layers.1.eh_proj.weight")),
        ("model.layers.1.eh_proj.weight", "is missing"),
    ),
    "renamed tensor": (edit_tensors(rename_expert), (EXPERT, "is missing", "nearest", "up_projection")),
    "extra tensor": (
        edit_tensors(lambda tensors: tensors.update({"model.norm.bias": torch.ones(3)})),
        ("model.norm.bias", "is none; nearest: model.norm.weight"),
    ),
    "extra layer": (
        edit_tensors(lambda tensors: tensors.update({"model.layers.7.enorm.weight": torch.ones(24)})),
        ("model.layers.7.enorm.weight", "is none"),
    ),
    "extra expert": (
        edit_tensors(lambda tensors: tensors.update({EXPERT.replace(".1.", ".4."): torch.ones(16, 24)})),
        ("experts.4.up_proj.weight", "is none"),
    ),
    "tensor in two files": (copy_into_second, (SECOND, "must be in one file", FIRST)),
    "wrong shape": (replace(NORM, lambda tensor: tensor[:23]), (NORM, "must have shape [24], has [23]")),
    "transposed": (
        replace(GATE, lambda tensor: tensor.T),
        ("must have shape [4, 24], has [24, 4]",),
    ),
    "another number of dims": (replace(NORM, lambda tensor: tensor[None]), (NORM, "has [1, 24]")),
    "no dims": (replace(NORM, lambda tensor: tensor[0]), (NORM, "must have shape [24], has []")),
    "float16 that config.json does not announce": (
        replace(NORM, lambda tensor: tensor.half()),
        (NORM, "must be BF16, F32, is F16"),
    ),
    "float64 that config.json does not announce": (
        replace(NORM, lambda tensor: tensor.double()),
        (NORM, "must be BF16, F32, is F64"),
    ),
    "norm in FP8": (replace(NORM, lambda tensor: tensor.to(torch.float8_e4m3fn)), (NORM, "is F8_E4M3")),
    "gate in FP8 with scales": (
        edit_tensors(
            lambda tensors: tensors.update(
                {
                    GATE: tensors[GATE].to(torch.float8_e4m3fn),
                    f"{GATE}_scale_inv": torch.ones(1, 1),
                }
            )
        ),
        (GATE, "must be BF16, F32, is F8_E4M3"),
    ),
    "NaN": (replace(NORM, put(torch.nan)), (NORM, "must hold finite numbers", "nan at [12]")),
    "infinity": (replace(NORM, put(torch.inf)), (NORM, "must hold finite numbers", "inf at [12]")),
    "NaN in the bias": (
        replace("model.layers.0.mlp.gate.e_score_correction_bias", put(torch.nan)),
        ("e_score_correction_bias", "nan at [2]"),
    ),
    "NaN in the MTP module": (
        replace("model.layers.1.eh_proj.weight", put(-torch.inf)),
        ("model.layers.1.eh_proj.weight", "-inf at [12, 0]"),
    ),
    "scales missing": (edit_tensors(lambda tensors: tensors.pop(SCALED + "_scale_inv")), (SCALED, "is missing")),
    "scales of another shape": (
        replace(SCALED + "_scale_inv", lambda tensor: tensor[:1]),
        (SCALED + "_scale_inv", "must be F32 or F8_E8M0 [2, 1], is F32 [1, 1]"),
    ),
    "scales in bfloat16": (
        replace(SCALED + "_scale_inv", lambda tensor: tensor.bfloat16()),
        (SCALED + "_scale_inv", "is BF16 [2, 1]"),
    ),
    "scales of a weight that is not in FP8": (
        replace(SCALED, lambda tensor: tensor.bfloat16()),
        (SCALED + "_scale_inv", "is none"),
    ),
    "scale below zero": (
        replace(SCALED + "_scale_inv", put(-1.0)),
        (SCALED + "_scale_inv", "above 0", "-1.0 at [1, 0]"),
    ),
    "scale of zero": (replace(SCALED + "_scale_inv", put(0.0)), (SCALED + "_scale_inv", "above 0, holds 0.0")),
    "scale NaN": (replace(SCALED + "_scale_inv", put(torch.nan)), (SCALED + "_scale_inv", "holds nan")),
    "scale infinite": (replace(SCALED + "_scale_inv", put(torch.inf)), (SCALED + "_scale_inv", "holds inf")),
    "product infinite": (
        replace(SCALED + "_scale_inv", lambda tensor: torch.full_like(tensor, 3e38)),
        (SCALED, "must hold finite numbers", "inf at"),
    ),
    "FP8 that config.json does not announce": (
        lambda folder: edit_json(folder / CONFIG, lambda keys: keys.pop("quantization_config")),
        ("quantization_config", "is F8_E4M3"),
    ),
    "copy of the embedding differs": (replace(COPY, put(0.123)), (COPY, "must equal model.embed_tokens.weight")),
    "copy of the head differs": (
        replace("model.layers.1.shared_head.head.weight", put(0.123)),
        ("model.layers.1.shared_head.head.weight", "must equal lm_head.weight"),
    ),
    "copy of another type": (replace(COPY, lambda tensor: tensor.float()), (COPY, "must be BF16 as", "is F32")),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(("damage", "words"), CASES.values(), ids=CASES.keys())
def test_a_broken_tensor_is_named_in_one_line(
    damage: Damage, words: tuple[str, ...], sound: Path, tmp_path: Path
) -> None:
    assert_refused(damaged(sound, tmp_path, damage), words)


@pytest.mark.parametrize("chunk_bytes", [1, 2**24])
def test_nan_among_fp8_codes_is_named_with_its_place(
    chunk_bytes: int, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.hf.reader, "CHUNK_BYTES", chunk_bytes)

    def poison(tensor: Tensor) -> Tensor:
        tensor.view(torch.uint8)[170, 5] = 0xFF
        return tensor

    folder = damaged(sound, tmp_path, replace(SCALED, poison))
    assert_refused(folder, (SCALED, "nan at [170, 5]"))


def test_values_too_large_for_the_models_type_are_rejected(sound: Path, tmp_path: Path) -> None:
    folder = damaged(sound, tmp_path, replace(NORM, put(1e5)))
    assert load_hf(folder, torch.float32).config.vocab_size == 48
    with pytest.raises(HfError, match=r"model.norm.weight: must hold finite numbers in torch.float16, holds inf at"):
        load_hf(folder, torch.float16)

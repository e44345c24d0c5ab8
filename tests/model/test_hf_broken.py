"""Broken files, indices, headers and tensors: each ends in one error of one line that names the file."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import model.hf.reader
from model.hf.checkpoint import open_checkpoint
from model.hf.files import HfError
from model.pretrained import load_hf
from tests.model.hf_checkpoints import edit_json
from tests.model.hf_damage import (
    CONFIG,
    COPY,
    EXPERT,
    FIRST,
    GATE,
    INDEX,
    NORM,
    SCALED,
    SECOND,
    Damage,
    assert_refused,
    copy_into_second,
    cut,
    damaged,
    edit_entry,
    edit_header,
    edit_index,
    edit_tensors,
    in_a_folder_above,
    join_file,
    make_endless,
    make_pipe,
    name_file,
    put,
    remove,
    rename_expert,
    replace,
    single_too,
    sound_checkpoint,
    swap_offsets,
    twice_in_header,
    write,
)

UNREADABLE = ("header", "must be one that safetensors reads")

CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # files
    "no config": (remove(CONFIG), (CONFIG, "must be a readable file")),
    "config never ends": (make_endless(CONFIG), (CONFIG, "a device")),
    "config not UTF-8": (write(CONFIG, b'{"a": "\xff"}'), (CONFIG, "must be JSON in UTF-8")),
    "config a list": (write(CONFIG, b"[1]"), (CONFIG, "must be an object")),
    "config too deep": (write(CONFIG, b'{"a":' + b"[" * 200_000), (CONFIG, "must be JSON")),
    "config with a key twice": (write(CONFIG, b'{"a": 1, "a": 2}'), (CONFIG, "'a' twice")),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], ("model.safetensors", "neither")),
    "index and single file": (single_too, ("model.safetensors", "must not exist next to")),
    "a file is missing": (remove(SECOND), (SECOND, "must be a readable file")),
    "a file is a pipe": (make_pipe(SECOND), (SECOND, "is a pipe")),
    "a file is empty": (write(SECOND, b""), (SECOND, "must have at least 8 bytes, has 0")),
    "cut in the header": (cut(SECOND, lambda _: 60), (SECOND, "header", "at most 52 bytes")),
    "cut in the data": (cut(SECOND, lambda size: size - 100), (SECOND, "is cut short")),
    "too long": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes() + b"\0"),
        (SECOND, "is too long"),
    ),
    # index
    "index is a list": (write(INDEX, b"[]"), (INDEX, "must be an object")),
    "index with NaN": (edit_index(lambda index: index.update(metadata=float("nan"))), (INDEX, "must be JSON", "NaN")),
    "index without map": (edit_index(lambda index: index.pop("weight_map")), (INDEX, "weight_map", "None")),
    "index names a number": (name_file(3), (INDEX, NORM, "plain name", "3")),
    "index leads up": (in_a_folder_above, (INDEX, NORM, "plain name", "../above.safetensors")),
    "index leads to the root": (name_file("/etc/passwd"), (INDEX, NORM, "plain name", "/etc/passwd")),
    "index leads up in other slashes": (name_file("..\\a.safetensors"), (INDEX, NORM, "plain name")),
    "index names the folder": (name_file(".."), (INDEX, NORM, "plain name", "'..'")),
    "index names a pickle": (name_file("pytorch_model.bin"), (INDEX, NORM, "plain name", ".safetensors")),
    "index names half a character": (name_file("\ud800.safetensors"), (INDEX, NORM, "plain name", "\\ud800")),
    "index names two lines": (name_file("a\n.safetensors"), (INDEX, NORM, "plain name")),
    "index names what no disk can": (name_file("a" * 250 + ".safetensors"), (INDEX, NORM, "plain name", "...")),
    "index names another file": (
        edit_index(lambda index: index["weight_map"].update({next(iter(index["weight_map"])): SECOND})),
        (INDEX, "must name the file that holds it", FIRST),
    ),
    "index names too much": (
        edit_index(lambda index: index["weight_map"].update({"a\nb": FIRST})),
        (FIRST, "a\\nb", "is missing"),
    ),
    "index names too little": (
        edit_index(lambda index: index["weight_map"].pop(NORM)),
        (NORM, "must be in model.safe"),
    ),
    # headers
    "header longer than the file": (
        lambda folder: (folder / FIRST).write_bytes(b"\xff" * 7 + b"\x7f" + (folder / FIRST).read_bytes()[8:]),
        (FIRST, "header", "9223372036854775807"),
    ),
    "header is a list": (lambda folder: join_file(folder / FIRST, [1], b""), (FIRST, "header", "must be an object")),
    "header with a tensor twice": (twice_in_header, (FIRST, "header", "twice")),
    "header with numbers in its metadata": (
        edit_header(lambda header: header.update(__metadata__={"format": 1})),
        (FIRST, *UNREADABLE, "expected a string"),
    ),
    "header with a list for a tensor": (
        edit_header(lambda header: header.update(extra=["F32", [0], [0, 0]])),
        (FIRST, "extra", "must have dtype, shape and data_offsets"),
    ),
    "two tensors in the same bytes": (edit_header(swap_offsets), (FIRST, *UNREADABLE, "invalid offset")),
    "unknown type": (edit_entry(NORM, dtype="I16"), (NORM, "dtype must be one of", "'I16'")),
    "other type for the same bytes": (edit_entry(NORM, dtype="F32"), (*UNREADABLE, "data type, or offset")),
    "shape of negative sizes": (edit_entry(NORM, shape=[-4, -6]), (*UNREADABLE, "integer `-4`")),
    "astronomic shape": (edit_entry(NORM, shape=[2**62, 2**62]), (*UNREADABLE, "overflow")),
    "offsets beyond the file": (
        edit_entry(NORM, data_offsets=[2**40, 2**40 + 48]),
        ("header", "must be one that safetensors reads"),
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_checkpoint(tmp_path_factory.mktemp("sound"))


def test_the_sound_checkpoint_loads(sound: Path) -> None:
    assert load_hf(sound, torch.float32).config.mtp_depth == 1


@pytest.mark.parametrize(("damage", "words"), CASES.values(), ids=CASES.keys())
def test_a_broken_file_is_named_in_one_line(
    damage: Damage, words: tuple[str, ...], sound: Path, tmp_path: Path
) -> None:
    assert_refused(damaged(sound, tmp_path, damage), words)


def test_a_path_that_is_no_folder_names_the_nearest(sound: Path) -> None:
    with pytest.raises(HfError, match=r"must be a checkpoint's folder, is none; nearest: sound"):
        load_hf(sound.parent / "sound_", torch.float32)
    with pytest.raises(HfError, match=r"config.json: must be a checkpoint's folder, is a file"):
        load_hf(sound / CONFIG, torch.float32)
    with pytest.raises(HfError, match=r"must be a checkpoint's folder, is none$"):
        load_hf(sound / "a" / "b", torch.float32)


def test_no_damage_to_a_header_or_index_ends_in_anything_but_one_error(sound: Path, tmp_path: Path) -> None:
    """Bytes changed, dropped or doubled at random places of every file that is read before data."""
    folder, draw = tmp_path / "broken", random.Random(0)
    shutil.copytree(sound, folder)
    refused = 0
    for _ in range(300):
        file = folder / draw.choice([CONFIG, INDEX, FIRST, SECOND])
        content = file.read_bytes()
        end = len(content)
        if file.suffix == ".safetensors":
            end = min(end, 8 + int.from_bytes(content[:8], "little") + 1)
        place, length = draw.randrange(end), draw.choice([1, 1, 1, 7])
        new = draw.choice(
            [bytes([draw.randrange(256)]), b"", b'"', b"{", b"9", b"-", content[place : place + length] * 2]
        )
        file.write_bytes(content[:place] + new + content[place + length :])
        text = refusal(folder)
        assert len(text.splitlines()) <= 1
        refused += bool(text)
        file.write_bytes(content)
    assert refused > 200


def refusal(folder: Path) -> str:
    """Returns the error of the checkpoint, or an empty string."""
    try:
        open_checkpoint(folder)
    except HfError as error:
        return str(error)
    return ""


TENSORS_CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(NORM)), (NORM, "is missing")),
    "one of the MTP module's tensors is missing": (
        edit_tensors(lambda tensors: tensors.pop("model.layers.1.eh_proj.weight")),
        ("model.layers.1.eh_proj.weight", "is missing"),
    ),
    "renamed tensor": (edit_tensors(rename_expert), (EXPERT, "is missing", "nearest", "up_projection")),
    "extra tensor": (
        edit_tensors(lambda tensors: tensors.update({"model.norm.bias": torch.ones(3)})),
        ("model.norm.bias", "is none; nearest: model.norm.weight"),
    ),
    "extra expert": (
        edit_tensors(lambda tensors: tensors.update({EXPERT.replace(".1.", ".4."): torch.ones(16, 24)})),
        ("experts.4.up_proj.weight", "is none"),
    ),
    "tensor in two files": (copy_into_second, (SECOND, "must be in one file", FIRST)),
    "wrong shape": (replace(NORM, lambda tensor: tensor[:23]), (NORM, "must have shape [24], has [23]")),
    "float16 that config.json does not announce": (
        replace(NORM, lambda tensor: tensor.half()),
        (NORM, "must be BF16, F32, is F16"),
    ),
    "gate in FP8 with scales": (
        edit_tensors(
            lambda tensors: tensors.update(
                {GATE: tensors[GATE].to(torch.float8_e4m3fn), f"{GATE}_scale_inv": torch.ones(1, 1)}
            )
        ),
        (GATE, "must be BF16, F32, is F8_E4M3"),
    ),
    "NaN": (replace(NORM, put(torch.nan)), (NORM, "must hold finite numbers", "nan at [12]")),
    "NaN in the MTP module": (
        replace("model.layers.1.eh_proj.weight", put(-torch.inf)),
        ("model.layers.1.eh_proj.weight", "-inf at [12, 0]"),
    ),
    "scales missing": (edit_tensors(lambda tensors: tensors.pop(SCALED + "_scale_inv")), (SCALED, "is missing")),
    "scales of another shape": (
        replace(SCALED + "_scale_inv", lambda tensor: tensor[:1]),
        (SCALED + "_scale_inv", "must be F32 or F8_E8M0 [2, 1], is F32 [1, 1]"),
    ),
    "scales of a weight that is not in FP8": (
        replace(SCALED, lambda tensor: tensor.bfloat16()),
        (SCALED + "_scale_inv", "is none"),
    ),
    "scale of zero": (replace(SCALED + "_scale_inv", put(0.0)), (SCALED + "_scale_inv", "above 0, holds 0.0")),
    "product infinite": (
        replace(SCALED + "_scale_inv", lambda tensor: torch.full_like(tensor, 3e38)),
        (SCALED, "must hold finite numbers", "inf at"),
    ),
    "FP8 that config.json does not announce": (
        lambda folder: edit_json(folder / CONFIG, lambda keys: keys.pop("quantization_config")),
        ("quantization_config", "is F8_E4M3"),
    ),
    "copy of the embedding differs": (replace(COPY, put(0.123)), (COPY, "must equal model.embed_tokens.weight")),
    "copy of another type": (replace(COPY, lambda tensor: tensor.float()), (COPY, "must be BF16 as", "is F32")),
}


@pytest.mark.parametrize(("damage", "words"), TENSORS_CASES.values(), ids=TENSORS_CASES.keys())
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

"""Checks of converted checkpoints: faults are named, other forms of the same weights pass, damage ends in one error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from torch import Tensor

from base.decode import decode
from base.refusal import ConfigError
from data.tokenizer import Tokenizer
from kernels.quantize.layout import QuantizedBlocks
from kernels.quantize.reference import dequantize_128x128, quantize_128x128
from launch.config.compose import read_option
from launch.convert import main
from model.config import ModelConfig
from model.hf.checkpoint import lay_out
from model.hf.config import write_config
from model.hf.files import HfError
from model.hf.names import stored_tensors
from tests.model import hf_damage
from tests.model.hf_checkpoints import edit_json, read_tensors, reference_model, save_checkpoint, write_tensors
from train.checkpoint.tensor_faults import StoredValues, agree

Edit = Callable[[dict[str, Tensor]], object]
SIZES: dict[str, Any] = {
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
LAYER = "model.layers.1."
SQUARE = LAYER + "self_attn.o_proj.weight"
EXPERT = LAYER + "mlp.experts.{}.{}_proj.weight"
UP = EXPERT.format(3, "up")
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates the same weights as `float32`, `bf16` in five files, `fp8`, and `checkpoint`."""
    folder = tmp_path_factory.mktemp("forms")
    # Experts have 136 rows: a whole block and a ragged one.
    save_checkpoint(folder / "float32", moe_intermediate_size=136, **SIZES)
    save_tokenizer(folder / "float32", "a b c d e f")
    for form in ("bf16", "fp8"):
        convert(f"from=hf format=hf dtype={form} path={folder / 'float32'} to={folder / form} max_shard_bytes=40000")
    convert(f"from=hf path={folder / 'float32'} to={folder / 'checkpoint'}")
    return folder


def convert(arguments: str) -> None:
    assert main(arguments.split()) == 0


def save_tokenizer(folder: Path, text: str) -> None:
    Tokenizer.train([text], 270).save(folder / "tokenizer.json")


def check(capsys: pytest.CaptureFixture[str], ours: Path, theirs: Path | str, *keys: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main([f"check={ours}", f"like={theirs}", *keys])
    return code, capsys.readouterr().out


def edited(folders: Path, tmp_path: Path, form: str, edit: Edit) -> Path:
    copy = shutil.copytree(folders / form, tmp_path / "edited", ignore=shutil.ignore_patterns("*.index.json"))
    tensors = read_tensors(copy)
    edit(tensors)
    write_tensors(copy, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return copy


def swap(tensors: dict[str, Tensor], first: str, second: str) -> None:
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


def swap_experts(tensors: dict[str, Tensor]) -> None:
    for part in ("gate", "up", "down"):
        swap(tensors, EXPERT.format(0, part), EXPERT.format(2, part))


def swap_scales(tensors: dict[str, Tensor]) -> None:
    tensors[UP + "_scale_inv"] = tensors[UP + "_scale_inv"].flip(0)


def halve_rotation(tensors: dict[str, Tensor]) -> None:
    """Orders rotary dimensions as first values of all pairs, then second ones, in keys and queries."""
    for name, first in (("q_b_proj", 8), ("q_b_proj", 24), ("kv_a_proj_with_mqa", 16)):
        rows = tensors[f"{LAYER}self_attn.{name}.weight"][first : first + 8]
        rows.copy_(rows.view(4, 2, -1).transpose(0, 1).reshape(rows.shape))


def truncate(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not name.endswith("bias"):
            tensors[name] = (tensor.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()


def flip_last_bit(codes: Tensor) -> Tensor:
    codes.view(torch.uint8)[7, 7] ^= 1
    return codes


def change(name: str, function: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({name: function(tensors[name].clone())})


FAULTS: list[tuple[str, str, Edit, str]] = [
    ("float32", "float32", change(SQUARE, lambda values: values.T), f"{SQUARE} is transposed"),
    ("bf16", "fp8", change(SQUARE, lambda values: values.T), f"{SQUARE} is transposed"),
    ("float32", "float32", change(UP, lambda values: values.T), f"{UP} is transposed: it has shape [24, 136]"),
    ("bf16", "fp8", swap_experts, f"has swapped experts: it holds the values of {EXPERT.format(2, 'gate')}; 5 further"),
    ("float32", "float32", lambda t: swap(t, EXPERT.format(0, "gate"), EXPERT.format(0, "up")), EXPERT.format(0, "up")),
    (
        "float32",
        "float32",
        change(LAYER + "mlp.gate.weight", lambda values: values[[1, 0, 2, 3]]),
        "has permuted experts: 2 of 4 rows are permuted: 0 holds 1; 0 further",
    ),
    (
        "float32",
        "float32",
        lambda t: t.pop(LAYER + "mlp.gate.e_score_correction_bias"),
        "e_score_correction_bias is missing; 0 further",
    ),
    (
        "bf16",
        "bf16",
        change(LAYER + "mlp.gate.e_score_correction_bias", Tensor.bfloat16),
        "has another type: BF16 instead of F32; 0 further",
    ),
    ("fp8", "bf16", swap_scales, f"{UP} has wrong scales in 2 blocks: that of [0, 0] is"),
    ("fp8", "fp8", swap_scales, ", that of block [1, 0]; 0 further"),
    (
        "fp8",
        "bf16",
        change(UP + "_scale_inv", lambda scales: scales * 1.04),
        f"{UP} has wrong scales in 2 blocks: that of [0, 0] is 1.0",
    ),
    ("fp8", "fp8", change(UP, flip_last_bit), f"{UP} differs in 1 of 3264 values"),
    ("fp8", "bf16", lambda t: t.pop(UP + "_scale_inv"), f"{UP} needs scales [2, 1]: {UP}_scale_inv are missing"),
    (
        "float32",
        "float32",
        change("model.layers.3.shared_head.head.weight", lambda values: values + 1),
        "model.layers.3.shared_head.head.weight is a stale copy: it must equal lm_head.weight",
    ),
    ("float32", "float32", lambda t: t.pop(UP), f"{UP} is missing; 0 further"),
    (
        "float32",
        "float32",
        lambda t: t.update({UP + "s": t[UP].clone()}),
        f"{UP}s is extra: the other side has no such",
    ),
    ("bf16", "fp8", halve_rotation, "q_b_proj.weight has permuted rotary dimensions (in halves"),
    ("float32", "float32", halve_rotation, "q_b_proj.weight has permuted rotary dimensions (in halves"),
    (
        "bf16",
        "float32",
        lambda t: swap(t, NORM, NORM.replace("input", "post_attention")),
        f"{NORM} holds the values of",
    ),
    ("float32", "float32", change(NORM, lambda values: values - 1), f"{NORM} is -1 off in each element; 0 further"),
    ("float32", "float32", change(NORM, lambda values: values * 2), f"{NORM} is 2 times the expected values"),
    ("float32", "float32", change(UP, torch.zeros_like), f"{UP} is zero; 0 further"),
    ("float32", "float32", change(UP, Tensor.bfloat16), f"{UP} has another type: BF16 instead of F32; 0 further"),
    ("float32", "float32", truncate, "model.embed_tokens.weight is truncated, not rounded, from F32 to BF16"),
    ("float32", "bf16", change(NORM, hf_damage.put(9.0)), f"{NORM} differs in 1 of 24 values: 9"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "like", "edit", "words"), FAULTS)
def test_check_names_the_fault(
    form: str, like: str, edit: Edit, words: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = check(capsys, edited(folders, tmp_path, form, edit), folders / like)
    line = next(line for line in out.splitlines() if line.startswith("different: "))
    assert code == 3
    assert words in line


@pytest.mark.parametrize(("factor", "is_right"), [(1.0, True), (1.01, False), (0.99, False)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_check_sees_a_scale_that_is_one_percent_off(factor: float, is_right: bool, power_of_two: bool) -> None:
    for seed in range(5):
        values = (torch.randn(256, 128, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16().float()
        codes, scales = quantize_128x128(values, power_of_two=power_of_two)
        scales[1] *= factor
        stored = StoredValues(dequantize_128x128(QuantizedBlocks(codes, scales), torch.float32), "F8_E4M3", scales)
        assert agree(stored, StoredValues(values, "BF16")) == is_right
        assert agree(StoredValues(values, "BF16"), stored) == is_right


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["bf16 fp8", "fp8 bf16", "fp8 float32", "checkpoint bf16", "float32 checkpoint"])
def test_check_passes_other_forms(pair: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pair.split()
    code, out = check(capsys, folders / ours, folders / theirs)
    assert code == 0, out
    assert out.endswith("no difference\n")
    assert "MTP copies" in out
    assert ("F8_E4M3" in out) == ("fp8" in pair)


@pytest.mark.slow
def test_check_passes_what_transformers_saves(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference_model(moe_intermediate_size=136, **SIZES).save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert check(capsys, folders / "bf16", tmp_path / "saved", "mtp=drop")[0] == 0
    code, out = check(capsys, tmp_path / "saved", folders / "float32")
    assert code == 3
    assert "is missing; mtp=drop leaves MTP modules out" in out
    code, out = check(capsys, tmp_path / "saved", folders / "float32", "mtp=drop")
    assert code == 0
    assert "logits of 16 ids differ by 0, 100 % same first choices; layers by at most 0 of 1e-05" in out
    assert "not compared: none in" in out


def test_check_names_a_tokenizer_of_another_model(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = edited(folders, tmp_path, "float32", lambda _: None)
    path = copy / "tokenizer.json"
    # The library writes the same rules with other bytes.
    path.write_text(json.dumps(json.loads(Backend.from_file(str(path)).to_str()), indent=1))
    assert "tokenizer     the same rules" in check(capsys, copy, folders / "float32")[1]
    save_tokenizer(copy, "ab abc ab abc")
    code, out = check(capsys, copy, folders / "float32")
    assert code == 3
    assert "different: tokenizer is another one: " in out
    edit_json(copy / "config.json", lambda keys: keys.update(eos_token_id=2))
    assert "config.eos_token_id is 1 there and 2 here" in check(capsys, copy, folders / "float32")[1]


def test_check_names_the_first_layer_whose_output_differs(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = edited(folders, tmp_path, "float32", change(NORM, lambda values: values * 1.01))
    code, out = check(capsys, copy, folders / "float32", "ids=[3,1,4,1,5,9]")
    assert code == 3
    assert "logits of 6 ids differ by" in out
    assert "outputs of layer 2 differ by " in out
    assert "the first of 1 parts" in out
    edit_json(copy / "config.json", lambda keys: keys["rope_parameters"].update(rope_theta=9000.0))
    out = check(capsys, copy, folders / "float32")[1]
    assert "different: config.rope_theta is 10000.0 there and 9000.0 here" in out
    assert "outputs of layer 0 differ by" in out


def test_check_is_not_led_by_sizes_that_a_file_claims(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = edited(folders, tmp_path, "float32", lambda _: None)
    edit_json(copy / "config.json", lambda keys: keys.update(num_hidden_layers=10**9))
    code, out = check(capsys, copy, folders / "float32")
    assert code == 3
    assert "different: config.num_layers is 3 there and 1000000000 here" in out
    assert "outputs       not compared: " in out


def write_inference_shards(folder: Path, tensors: dict[str, Tensor], num_ranks: int, num_experts: int) -> None:
    """Writes the files of DeepSeek's inference code, spelled a second time."""
    short = {
        "embed_tokens": "embed", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b", "kv_a_proj_with_mqa": "wkv_a",
        "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
        "up_proj": "w3", "lm_head": "head",
    }  # fmt: skip
    split = {"embed": 0, "wq_b": 0, "wkv_b": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "head": 0}
    folder.mkdir()
    for rank in range(num_ranks):
        ranks_tensors = {}
        for name, tensor in tensors.items():
            if name.startswith("model.layers.3."):
                continue
            *_, key, _ = name.split(".")
            new = name.removeprefix("model.").replace(key, short.get(key, key)).replace("e_score_correction_", "")
            new = new.replace("self_attn", "attn").replace("mlp", "ffn").replace("weight_scale_inv", "scale")
            if ".experts." in new:
                if int(new.split(".")[4]) // (num_experts // num_ranks) != rank:
                    continue
            elif (axis := split.get(short.get(key, key))) is not None:
                tensor = tensor.chunk(num_ranks, axis)[rank]
            ranks_tensors[new] = tensor.clone()
        write_tensors(folder, ranks_tensors)
        (folder / "model.safetensors").rename(folder / f"rank{rank}")
    for rank in range(num_ranks):
        (folder / f"rank{rank}").rename(folder / f"model{rank}-mp{num_ranks}.safetensors")


@pytest.mark.slow
def test_check_reads_the_files_of_deepseeks_inference_code(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = read_tensors(folders / "bf16")
    write_inference_shards(tmp_path / "mp2", tensors, 2, 4)
    code, out = check(capsys, tmp_path / "mp2", folders / "fp8")
    assert code == 0, out
    assert "MTP modules, which files for DeepSeek's inference code leave out" in out
    write_inference_shards(tmp_path / "fp8", read_tensors(folders / "fp8"), 1, 4)
    assert check(capsys, tmp_path / "fp8", folders / "fp8")[0] == 0
    swap(tensors, EXPERT.format(0, "up"), EXPERT.format(1, "up"))
    write_inference_shards(tmp_path / "swapped", tensors, 2, 4)
    code, out = check(capsys, tmp_path / "swapped", folders / "fp8")
    assert code == 3
    assert f"{EXPERT.format(0, 'up')} has swapped experts" in out
    with pytest.raises(HfError, match=r"config.json: must be there in like, is not; nearest: this folder as check"):
        main([f"check={folders / 'fp8'}", f"like={tmp_path / 'mp2'}"])
    second = tmp_path / "mp2" / "model1-mp2.safetensors"
    copies = load_file(second)
    save_file(copies | {"norm.weight": 2 * copies["norm.weight"]}, second)
    with pytest.raises(HfError, match=r"model.norm.weight: must equal the copy in model0-mp2.safetensors, differs"):
        main([f"check={tmp_path / 'mp2'}", f"like={folders / 'fp8'}"])
    second.unlink()
    with pytest.raises(HfError, match=r"model1-mp2.safetensors: must be there"):
        main([f"check={tmp_path / 'mp2'}", f"like={folders / 'fp8'}"])


def test_check_compares_names_and_shapes_of_a_released_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = decode(ModelConfig, {**read_option("model", "moonlight_16b"), "head": "tokens"})
    plan = stored_tensors(config, dtype="BF16", fp8=False)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, dtype="BF16", fp8=False)))

    def write() -> None:
        # A sparse file: 32 GB of zeros that take no space.
        _, header = lay_out(plan)
        sizes = {"BF16": 2, "F32": 4}
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(stored.num_elements * sizes[stored.dtype] for stored in plan.values()))

    write()
    code, out = check(capsys, tmp_path, "moonlight_16b")
    assert code == 0
    assert "not compared  values, tokenizer, outputs" in out
    assert out.endswith("no difference in names, shapes, types and config\n")
    plan.pop(UP)
    write()
    code, out = check(capsys, tmp_path, "moonlight_16b")
    assert code == 3
    assert f"different: {UP} is missing; 0 further tensors" in out
    code, out = check(capsys, tmp_path, "deepseek_v3")
    assert code == 3
    assert "different: config.vocab_size is 129280 there and 163840 here" in out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (hf_damage.cut(hf_damage.FIRST, lambda size: size - 9), "it is cut short"),
        (hf_damage.in_a_folder_above, "must be the plain name of a .safetensors file next to it"),
        (hf_damage.twice_in_header, "must have every key once"),
        (hf_damage.replace(hf_damage.NORM, hf_damage.put(float("nan"))), "must hold finite numbers, holds nan at"),
        (hf_damage.replace(hf_damage.SCALED + "_scale_inv", hf_damage.put(float("inf"))), "finite numbers above 0"),
        (hf_damage.remove("config.json"), "nor is it a Hugging Face folder"),
        (hf_damage.make_pipe(hf_damage.FIRST), "is a pipe or a device"),
    ],
)
def test_check_ends_in_one_error_for_damage(
    damage: hf_damage.Damage, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = hf_damage.sound_checkpoint(tmp_path / "sound")
    broken = hf_damage.damaged(sound, tmp_path, damage)
    with pytest.raises(ValueError, match=words) as caught:
        main([f"check={broken}", f"like={sound}"])
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("like=float32", "like: must be null without check"),
        ("check=float32", "like: must be a folder with weights or one of deepseek_v3"),
        ("check=float32 like=deepseek_v4", "did you mean deepseek_v3"),
        ("check=none like=float32", "check: must be a folder with weights, 'none' is no folder"),
        ("check=float32 like=float32 to=new", "to: must be absent with check, is new"),
        ("check=float32 like=float32 dtype=fp8", "dtype: must be one of bf16, float32"),
        ("check=float32 like=float32 ids=[1,48,2]", "ids: must be at least 3 ids below 48"),
        ("check=float32 like=float32 tolerance=0", "tolerance: must be above 0"),
    ],
)
def test_check_refuses_wrong_keys(arguments: str, words: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    with pytest.raises(ConfigError, match=words):
        main(["from=hf", "path=a", "to=b", *arguments.split()] if "check" not in arguments else arguments.split())

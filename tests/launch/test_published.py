"""Tests of checkpoints in every published layout: they load, train a step, and are exported with all their files.

The checkpoints are written by `tests.model.published_checkpoints`, which knows nothing of this project.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, GenerationConfig

from data.tokenizer import Tokenizer
from launch.convert import main as convert_main
from launch.generate import main as generate
from model.hf.files import HfError
from model.pretrained import load_hf, save_hf
from tests.data.published_tokenizers import write_family
from tests.launch.test_config import build
from tests.model.hf_checkpoints import assert_same_tensors, edit_json, read_tensors
from tests.model.published_checkpoints import LAYOUTS, LICENCE, as_plain, write_published
from tests.ranks import run_ranks
from tests.tiny import write_text
from tests.train.weight_jobs import Started, run_config, start_jobs
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.preserved import preserved_by_run, read_preserved
from train.checkpoint.sources import check_initial, source_config

# `torch_dtype` may change with the conversion, and keys of the architecture are checked by the model they describe.
KEPT_KEYS = ("aux_loss_alpha", "auto_map", "ep_size", "seq_aux", "house_note", "pretraining_tp", "transformers_version")
FILES = ("LICENSE-MODEL", "configuration_deepseek.py", "chat_template.jinja")


def convert(arguments: list[str]) -> int:
    return convert_main([*arguments, "accept_template=true"])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Creates a folder for every layout with its publisher's tokenizer, and the content of each."""
    folder = tmp_path_factory.mktemp("published")
    write_text(folder, num_files=20)
    made = {}
    for name in LAYOUTS:
        made[name] = write_published(name, folder / name)
        write_family("kimi" if name == "kimi_k2" else "deepseek", folder / name)
    return folder, made


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def assert_carried(target: Path, source: Path) -> None:
    """Checks that unknown keys, token ids, the kind of model and all files next to the weights are carried over."""
    made, before = config_of(target), config_of(source)
    for key in (*KEPT_KEYS, "bos_token_id", "eos_token_id", "model_type"):
        assert made[key] == before[key], key
    for path in source.iterdir():
        if not path.name.startswith(("model", "config.json")):
            assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert (target / "LICENSE-MODEL").read_text() == LICENCE


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_conversion_into_other_files_keeps_every_byte_and_key(
    name: str, published: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, tensors = published
    source, target = folder / name, tmp_path / "hf"
    assert convert(["from=hf", "format=hf", f"path={source}", f"to={target}", "max_shard_bytes=300000"]) == 0
    assert_same_tensors(read_tensors(target), tensors[name])
    assert_carried(target, source)
    made, before = config_of(target), config_of(source)
    if not LAYOUTS[name].mtp:
        before["num_nextn_predict_layers"] = 0
    assert {key: made.get(key) for key in before} == before
    save_hf(load_hf(source, torch.float32), tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), tensors[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversion_to_a_checkpoint_and_back_keeps_values_and_keys(
    name: str, published: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, tensors = published
    assert convert(["from=hf", f"path={folder / name}", f"to={tmp_path / 'ours'}"]) == 0
    assert convert(["from=checkpoint", f"path={tmp_path / 'ours'}", f"to={tmp_path / 'back'}"]) == 0
    made = read_tensors(tmp_path / "back")
    plain = as_plain(tensors[name])
    expected = {each: plain[each].to(made[each].dtype) if each in plain else tensors[name][each] for each in made}
    assert plain.keys() | {each for each in tensors[name] if each.endswith("inv_freq")} == made.keys()
    assert_same_tensors(made, expected)
    assert_carried(tmp_path / "back", folder / name)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    name: str, published: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """Compares with transformers in float32, because its FP8 code does not support ragged blocks."""
    folder, tensors = published
    save_file(as_plain(tensors[name]), tmp_path / "model.safetensors", {"format": "pt"})
    keys = config_of(folder / name)
    keys |= {"model_type": "deepseek_v3", "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(
        json.dumps({key: keys[key] for key in keys if key not in ("quantization_config", "auto_map")})
    )
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens_BT = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(2))
    ours_BTV = load_hf(folder / name, torch.float32)(tokens_BT)
    torch.testing.assert_close(ours_BTV, reference(tokens_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(published: tuple[Path, dict[str, dict[str, Tensor]]]) -> dict[str, Started]:
    """Trains and saves one step from every layout, and one without MTP from the first."""
    folder, configs = published[0], {}
    for name in LAYOUTS:
        config = run_config(folder, name, "one", f"run_{name}")
        file = folder / name / ("tiktoken.model" if name == "kimi_k2" else "tokenizer.json")
        configs[name] = replace(
            config, data=replace(config.data, tokenizer=str(file)), task=replace(config.task, steps=1)
        )
    config = configs["v3"]
    model = replace(config.model, mtp_depth=0)
    configs["drop"] = replace(config, out_dir=str(folder / "run_drop"), model=model, init_mtp="drop")
    (runs,) = run_ranks(1, start_jobs, list(configs.values()), True)
    return dict(zip(configs, runs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_trained_and_the_export_has_all_that_was_carried(
    name: str, published: tuple[Path, dict[str, dict[str, Tensor]]], trained: dict[str, Started], tmp_path: Path
) -> None:
    folder, tensors = published
    run, plain = trained[name], as_plain(tensors[name])
    assert "unknown keys of config.json are preserved: house_note" in run.said
    assert run.losses[0] > 0
    for each, tensor in run.first.items():
        assert torch.equal(tensor, plain[each].to(tensor.dtype)), each
    assert any(not torch.equal(run.last[each], run.first[each]) for each in run.first)
    assert convert(["from=checkpoint", f"path={run.checkpoint}", f"to={tmp_path / 'out'}", "dtype=bf16"]) == 0
    made = read_tensors(tmp_path / "out")
    for each, tensor in tensors[name].items():
        if each.endswith("inv_freq"):
            assert torch.equal(made[each], tensor), each
    assert len(made) == len(plain) + sum(each.endswith("inv_freq") for each in tensors[name])
    assert_carried(tmp_path / "out", folder / name)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    special = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert generation.eos_token_id is not None
    assert special["eos_token"] == ("[EOS]" if name == "kimi_k2" else "<｜end▁of▁sentence｜>")
    if name != "kimi_k2":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.convert_tokens_to_ids(special["eos_token"]) == generation.eos_token_id
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        assert chat == "hello"
        assert config_of(tmp_path / "out")["aux_loss_alpha"] == 0.001


def test_a_resumed_run_carries_on_and_another_tokenizer_replaces_what_is_of_the_old_one(
    published: tuple[Path, dict[str, dict[str, Tensor]]], trained: dict[str, Started], tmp_path: Path
) -> None:
    folder, checkpoint = published[0], str(trained["moonlight"].checkpoint)
    before = read_preserved(str(folder / "moonlight"), "x")
    config = replace(run_config(folder, "moonlight", "one", "x"), resume=checkpoint, init_from=None)
    own = folder / "moonlight" / "tokenizer.json"
    config = replace(config, data=replace(config.data, tokenizer=str(own)))
    carried = preserved_by_run(config, Tokenizer.load(own))
    assert (carried.config, carried.files) == (before.config, before.files)
    assert_same_tensors(dict(carried.rotary), dict(before.rotary))
    assert len(carried.rotary) == 2
    named = replace(config, data=replace(config.data, tokenizer_bos=""))
    ids = preserved_by_run(named, Tokenizer.load(own)).config.keys() ^ before.config.keys()
    assert ids == {"bos_token_id", "eos_token_id"}
    path = write_family("llama3", tmp_path)
    other = preserved_by_run(replace(config, data=replace(config.data, tokenizer=str(path))), Tokenizer.load(path))
    assert sorted(other.files) == ["LICENSE-MODEL", "tokenizer_config.json"]
    assert other.files["tokenizer_config.json"] == (tmp_path / "tokenizer_config.json").read_bytes()
    assert "eos_token_id" not in other.config
    assert other.config["aux_loss_alpha"] == 0.001
    longer = replace(config, model=replace(config.model, rope_theta=10000.0))
    assert not preserved_by_run(longer, Tokenizer.load(own)).rotary


def test_a_run_can_leave_mtp_modules_out(
    published: tuple[Path, dict[str, dict[str, Tensor]]], trained: dict[str, Started]
) -> None:
    folder = published[0]
    assert not [each for each in trained["drop"].first if ".layers.2." in each]
    assert any(".layers.2." in each for each in trained["v3"].first)
    chosen = build("model=of_checkpoint", f"init_from={folder / 'v3'}", "init_mtp=drop")
    assert chosen.model.mtp_depth == 0
    with pytest.raises(CheckpointError, match=r"^model\.mtp_depth: must be 0 with init_mtp=drop, is 1"):
        check_initial(replace(chosen, model=replace(chosen.model, mtp_depth=1)))


def test_mtp_modules_that_are_dropped_are_not_looked_at(
    published: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MTP layers that config.json does not declare are rejected, or dropped if that is requested."""
    folder, tensors = published
    source = tmp_path / "source"
    write_published("bf16_without_mtp", source)
    for file in source.glob("model*"):
        file.unlink()
    own = tensors["bf16_without_mtp"]
    save_file({**own, "model.layers.2.odd.weight": torch.zeros(3)}, source / "model.safetensors", {"format": "pt"})
    edit_json(source / "config.json", lambda keys: keys.update(num_nextn_predict_layers=0))
    write_family("deepseek", source)
    with pytest.raises(HfError, match=r"layers\.2\.odd.*init_mtp=drop, in launch\.convert mtp=drop"):
        load_hf(source, torch.float32)
    assert load_hf(source, torch.float32, drop_mtp=True).config.mtp_depth == 0
    assert source_config(str(source), "x", drop_mtp=True).mtp_depth == 0
    assert convert(["from=hf", "format=hf", f"path={source}", f"to={tmp_path / 'hf'}", "mtp=drop"]) == 0
    assert_same_tensors(read_tensors(tmp_path / "hf"), own)
    assert generate([f"ckpt={source}", "prompt=hello", "max_new_tokens=2", "speculative=false"]) == 0
    assert capsys.readouterr().out.strip()
    # A checkpoint of ours leaves them out as well.
    assert convert(["from=hf", f"path={folder / 'v3'}", f"to={tmp_path / 'ours'}"]) == 0
    assert convert(["from=checkpoint", f"path={tmp_path / 'ours'}", f"to={tmp_path / 'out'}", "mtp=drop"]) == 0
    assert not [name for name in read_tensors(tmp_path / "out") if ".layers.2." in name]
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0

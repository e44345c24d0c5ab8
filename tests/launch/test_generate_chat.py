"""Tests that a run on chats keeps its template, exports it, and is asked by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data.arithmetic import ArithmeticSource, arithmetic_tokenizer
from data.chat.encode import encode_prompt
from data.chat.jinja import CHAT_TEMPLATE_NAME, template_jinja, template_of
from data.chat.messages import user
from data.chat.sources import ChatSource
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError
from data.tokenizer import Tokenizer
from infer.generate import generate
from launch import convert
from launch.generate import main
from tests.data.chat.conversations import chat_tokenizer
from tests.infer.models import make_foresighted
from tests.launch.checkpoints import write_checkpoint
from tests.tiny import tiny_config
from train.checkpoint.load import load_whole
from train.checkpoint.manifest import read_model
from train.checkpoint.preserved import preserved_by_run
from train.config.errors import ConfigError


def source_of(template: str) -> ArithmeticSource:
    """Returns a source of problems under a template."""
    return ArithmeticSource(
        kind="arithmetic",
        form="demonstrations",
        template=template,
        domains=("sort",),
        num_digits=8,
        num_samples=10,
        wrong_share=0.0,
        generator_seed=0,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the checkpoint of a run under the template of V3.1."""
    folder = write_checkpoint(tmp_path_factory.mktemp("run"), make_foresighted(dtype=torch.float32), tokenizer=False)
    tokenizer = chat_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    config = tiny_config(folder)
    config = replace(config, data=replace(config.data, source=source_of("v3_1")))
    for name, content in preserved_by_run(config, tokenizer).files.items():
        (folder / name).write_bytes(content)
    return folder


def answer(folder: Path, template: str, text: str, thinking: bool | None) -> str:
    """Returns what the model answers, computed without the command."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    prompt = encode_prompt([user(text)], CHAT_TEMPLATES.get(template), tokenizer, thinking=thinking)
    model = load_whole(read_model(folder), folder, torch.float32)
    made = generate(model, [prompt], max_new_tokens=8, stop=[tokenizer.end_of_sentence_id]).continuations
    return tokenizer.decode(list(made[0].tokens))


@pytest.mark.parametrize(
    ("arguments", "template", "thinking"),
    [
        (["chat=auto"], "v3_1", None),
        (["chat=auto", "thinking=true"], "v3_1", True),
        (["chat=v3"], "v3", None),
        (["chat=r1", "thinking=false"], "r1", False),
    ],
)
def test_prompts_are_asked_by_the_template(
    arguments: list[str], template: str, thinking: bool | None, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "sort <｜Assistant｜> 31"
    main([f"ckpt={checkpoint}", f"prompt={text}", "temperature=0", "max_new_tokens=8", *arguments])
    assert capsys.readouterr().out == answer(checkpoint, template, text, thinking) + "\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["chat=v33"], "chat: must be one of v3, r1, r1_distill, v3_1, auto, is 'v33'; did you mean v3"),
        (["thinking=true"], "thinking: must be null without chat, is True; nearest valid: chat=auto"),
        (
            ["chat=v3", "thinking=true"],
            "thinking: must be false with chat=v3, is true; nearest valid: chat=r1 or r1_distill or v3_1",
        ),
    ],
)
def test_wrong_choices_of_templates_are_rejected(arguments: list[str], error: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        main([f"ckpt={checkpoint}", "prompt=a", *arguments])
    assert str(refused.value).startswith(error)


def test_weights_without_a_template_or_its_tokens_are_rejected(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, make_foresighted(dtype=torch.float32))
    with pytest.raises(
        ConfigError, match=r"chat: auto needs weights of a run on chats, .* one of v3, r1, r1_distill, v3_1$"
    ):
        main([f"ckpt={folder}", "prompt=a", "chat=auto"])
    with pytest.raises(DataError, match="chat: r1 places the token '<think>', which must be a special token"):
        main([f"ckpt={folder}", "prompt=a", "chat=r1"])
    with pytest.raises(ConfigError, match="chat: must be null with prompt_ids, is 'v3'"):
        main([f"ckpt={folder}", "prompt_ids=[0]", "chat=v3"])


def test_exports_have_the_runs_template_for_transformers(checkpoint: Path, tmp_path: Path) -> None:
    assert template_of(checkpoint) == "v3_1"
    convert.main(["from=checkpoint", f"path={checkpoint}", f"to={tmp_path / 'hf'}"])
    assert template_of(tmp_path / "hf") == "v3_1"
    other: Any = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    messages = [{"role": "user", "content": "sort 31"}]
    for thinking in (False, True):
        read = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, thinking=thinking)
        template, tokenizer = CHAT_TEMPLATES.get("v3_1"), chat_tokenizer()
        assert list(read) == encode_prompt([user("sort 31")], template, tokenizer, thinking=thinking)


def test_a_run_on_chats_replaces_the_template_of_its_initial_weights(checkpoint: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.json")
    (checkpoint / "chat_template.json").write_text("{}")
    kept = replace(config, init_from=str(checkpoint))
    before = preserved_by_run(kept, tokenizer).files
    assert before[CHAT_TEMPLATE_NAME] == template_jinja(CHAT_TEMPLATES.get("v3_1")).encode()
    source = ChatSource(kind="chat", paths=("a",), template="r1", too_long="cut")
    changed = replace(kept, data=replace(kept.data, source=source))
    after = preserved_by_run(changed, tokenizer).files
    assert after[CHAT_TEMPLATE_NAME] == template_jinja(CHAT_TEMPLATES.get("r1")).encode()
    assert before.keys() - after.keys() == {"chat_template.json"}
    (checkpoint / "chat_template.json").unlink()
    fresh = replace(config, data=replace(config.data, source=source_of("v3")))
    assert set(preserved_by_run(fresh, arithmetic_tokenizer()).files) == {CHAT_TEMPLATE_NAME}

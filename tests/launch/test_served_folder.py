"""Readers of configurations, of transformers and of installed servers, agree about an exported folder."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from base.refusal import ConfigError
from data.chat.templates import CHAT_TEMPLATE_NAME
from data.corpus import DataError
from data.tokenizer import Tokenizer
from launch.convert import main
from tests.refusals import assert_refused

MESSAGES = [{"role": "user", "content": "def"}]


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "hf"
    assert main(["from=checkpoint", f"path={run}", f"to={folder}", "chat_template=v3", "dtype=bf16"]) == 0
    return folder


def part_of(module: str, name: str) -> Callable[..., Any]:
    """Returns a reader of a package, or skips the test with the reason if it cannot be imported."""
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported: {error}")


def read_by_transformers(folder: str) -> tuple[Any, Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    return config, generation, transformers.AutoTokenizer.from_pretrained(folder)


def read_by_vllm(folder: str) -> tuple[Any, Any, Any]:
    """Calls the readers of vLLM 0.33.0."""
    get_config = part_of("vllm.transformers_utils.config", "get_config")
    get_generation_config = part_of("vllm.transformers_utils.config", "try_get_generation_config")
    get_tokenizer = part_of("vllm.tokenizers.registry", "get_tokenizer")
    config = get_config(folder, trust_remote_code=False)
    return config, get_generation_config(folder, trust_remote_code=False), get_tokenizer(folder)


def read_by_sglang(folder: str) -> tuple[Any, Any, Any]:
    """Calls the readers of SGLang 0.5.23."""
    get_config = part_of("sglang.srt.utils.hf_transformers.config", "get_config")
    get_generation_config = part_of("sglang.srt.utils.hf_transformers.common", "get_generation_config")
    get_tokenizer = part_of("sglang.srt.utils.hf_transformers.tokenizer", "get_tokenizer")
    config = get_config(folder, trust_remote_code=False)
    return config, get_generation_config(folder, trust_remote_code=False), get_tokenizer(folder)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("read", [read_by_transformers, read_by_vllm, read_by_sglang])
def test_reader_finds_network_special_tokens_and_template(
    read: Callable[[str], tuple[Any, Any, Any]], exported: Path
) -> None:
    config, generation, served = read(str(exported))
    ours = Tokenizer.load(exported / "tokenizer.json")
    written = json.loads((exported / "config.json").read_text())
    assert (config.model_type, config.n_routed_experts) == ("deepseek_v3", written["n_routed_experts"])
    special = ours.special
    for holder in (generation, served):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (
            special.bos,
            special.eos,
            special.pad,
        )
    assert served.model_max_length == written["max_position_embeddings"]
    prompt = served.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompt == [
        special.bos,
        ours.special_id("<｜User｜>"),
        *ours.encode("def"),
        ours.special_id("<｜Assistant｜>"),
    ]


def test_template_that_cannot_be_served_is_refused(run: Path, exported: Path, tmp_path: Path) -> None:
    given = ["from=checkpoint", f"path={run}", f"to={tmp_path / 'hf'}"]
    # R1's thoughts have tokens that this tokenizer lacks.
    for template, parts in (("r1", ["chat_template", "<think>"]), ("v9", ["chat_template", "v9", "v3"])):
        assert_refused((DataError, ConfigError), parts, lambda name=template: main([*given, f"chat_template={name}"]))  # type: ignore[misc]
    target = [f"path={exported}", "from=hf", f"to={tmp_path / 'hf'}", "chat_template=v3"]
    assert_refused(ConfigError, ["chat_template", "null"], lambda: main(target))
    assert not (tmp_path / "hf").exists()
    # A template of the source is known, and stays.
    assert main(["from=hf", "format=hf", f"path={exported}", f"to={tmp_path / 'hf'}"]) == 0
    assert (tmp_path / "hf" / CHAT_TEMPLATE_NAME).read_bytes() == (exported / CHAT_TEMPLATE_NAME).read_bytes()

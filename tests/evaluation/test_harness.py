"""Tests of the adapter to lm-evaluation-harness: its numbers are those of the package's `hf` model on the export."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from base.decode import decode
from base.refusal import ConfigError
from comm.dispatch.local import LocalDispatcher
from data.tokenizer import TOKENIZER_NAME, Tokenizer
from evaluation.protocol import EvaluationError
from launch.api import open_harness_model
from model.pretrained import save_hf
from model.transformer import Transformer, initialize_weights
from tests.tiny import MODEL
from train.checkpoint.preserved import server_files

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed (pip install -e '.[lm-eval]')")
TEXT = "One fish, two fish. A red fish and a blue fish swim in the old river; black fish, old fish, new fish.\n"
TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "own_documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "own_answers": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "x"
generation_kwargs: {until: ["fi", "zz"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An exported folder of a model with strong preferences, and its tokenizer."""
    model = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float32)
    initialize_weights(model, 3)
    tokenizer = Tokenizer.train([TEXT * 40], MODEL.vocab_size)
    folder = tmp_path / "export"
    _, files = server_files(tokenizer, MODEL.max_position_tokens)
    save_hf(model, folder)
    tokenizer.save(folder / TOKENIZER_NAME)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": tokenizer.special.bos, "eos_token_id": tokenizer.special.eos}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = TEXT.split()
    lines = [
        {
            "context": " ".join(words[: n % 9]) + (" " if n % 2 else ""),
            "choices": [words[n % 20], " " + words[(n + 3) % 20], "Zö"],
            "answer": n % 3,
            "text": TEXT[n:] * (1 + n % 4),
        }
        for n in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1}}\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n{content}"
        )
    return folder


@needs_harness
@pytest.mark.long
def test_harness_numbers_are_those_of_its_own_model(
    export: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    ours = open_harness_model(str(export), batch_size=5)

    def run(model: object, *names: str) -> dict:
        settings = {"task_manager": manager, "log_samples": True, "bootstrap_iters": 0}
        return lm_eval.simple_evaluate(model=model, tasks=list(names), **settings)

    def theirs(*, add_bos_token: bool) -> HFLM:
        settings = {"dtype": "float32", "device": "cpu", "batch_size": 4}
        return HFLM(pretrained=str(export), add_bos_token=add_bos_token, **settings)

    # With its begin of sentence, their model also scores this token of a document, after another one.
    both = [
        run(theirs(add_bos_token=True), "own_choice", "own_answers"),
        run(theirs(add_bos_token=False), "own_documents"),
    ]
    found = [{key: both[0][key] | both[1][key] for key in ("samples", "results")}, run(ours, *TASKS)]
    one, two = (each["samples"] for each in found)
    for task in TASKS:
        assert len(one[task]) == len(two[task]) == 12
        for left, right in zip(one[task], two[task], strict=True):
            assert left["arguments"] == right["arguments"]
            if task == "own_answers":
                assert left["resps"] == right["resps"]
                continue
            for (a,), (b,) in zip(left["resps"], right["resps"], strict=True):
                values = [(each if isinstance(each, tuple) else (each,)) for each in (a, b)]
                assert float(values[0][0]) == pytest.approx(float(values[1][0]), abs=1e-3)
                assert [str(value) for value in values[0][1:]] == [str(value) for value in values[1][1:]]
    results = [each["results"] for each in found]
    assert results[0]["own_choice"]["acc,none"] == results[1]["own_choice"]["acc,none"]
    bits = [each["own_documents"]["bits_per_byte,none"] for each in results]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    continuations = [each["resps"][0][0] for each in two["own_answers"]]
    assert all("fi" not in text for text in continuations)


@needs_harness
@pytest.mark.slow
def test_harness_refuses_settings_that_the_engine_lacks(export: Path) -> None:
    from evaluation.harness import HarnessModel

    model = open_harness_model(str(export))
    with pytest.raises(EvaluationError, match=r"generation_kwargs: must be some of until, .*, has 'num_beams'"):
        model._generation("a", {"until": ["b"], "num_beams": 2})
    with pytest.raises(EvaluationError, match="apply_chat_template: must be false"):
        model.apply_chat_template([{"role": "user", "content": "a"}])
    assert isinstance(model, HarnessModel)
    request = model._generation("a", {"until": "b", "do_sample": True, "temperature": 0.5, "max_new_tokens": 3})
    assert (request.stop, request.max_new_tokens, request.sampling.temperature) == (("b",), 3, 0.5)
    assert model._generation("a", {"until": ["b"], "temperature": 0.0}).sampling.temperature == 0
    assert model._generation("a", {"until": ["b"], "do_sample": False, "temperature": 1.0}).sampling.temperature == 0


@needs_harness
@pytest.mark.slow
def test_harness_reads_chats_as_the_template_places_them(export: Path) -> None:
    from data.chat.encode import encode_any_prompt
    from data.chat.messages import ChatMessage
    from data.chat.templates import CHAT_TEMPLATES

    model = open_harness_model(str(export), chat="v3")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A fish <｜User｜>?"}]
    text = model.apply_chat_template(chat)
    messages = [decode(ChatMessage, message) for message in chat]
    ids = encode_any_prompt(messages, CHAT_TEMPLATES.get("v3"), model._tokenizer)
    assert list(model._generation(text, {"until": ["b"]}).prompt) == ids
    assert model._encode_pair(text, " red") == (ids, model._tokenizer.encode(" red"))
    with pytest.raises(EvaluationError, match="apply_chat_template: must not spell special tokens"):
        model.apply_chat_template([chat[0], {"role": "user", "content": "A fish "}, {"role": "user", "content": "?"}])
    begun = model.apply_chat_template([*chat, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert list(model._chat_ids(begun) or ()) == [*ids, *model._tokenizer.encode("It is")]
    with pytest.raises(EvaluationError, match="cache_requests: must be false"):
        model._generation(text + "never rendered", {"until": ["b"]})
    assert "User" in model.chat_template("v3")
    assert model.tokenizer_name != open_harness_model(str(export)).tokenizer_name


def test_harness_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm_eval: must be installed, is not; run pip install"):
        open_harness_model("none")

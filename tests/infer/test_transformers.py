"""Tests that released-format checkpoints generate the same tokens as transformers, with and without drafts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infer.generate import generate
from model.hf.convert import load_hf
from tests.model.hf_checkpoints import YARN, mtp_tensors, random_tokens, read_tensors, reference_model, write_tensors

CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_q_lora": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 128},
}


@pytest.mark.parametrize("shape", CHANGES)
@torch.no_grad()
def test_greedy_continuations_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    reference = reference_model(3, **CHANGES[shape])
    prompts = random_tokens(3, 9)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, 9:].tolist()
    reference.save_pretrained(tmp_path)
    write_tensors(tmp_path, {**read_tensors(tmp_path), **mtp_tensors(tmp_path)})
    model = load_hf(tmp_path, torch.float32)
    assert model.config.mtp_depth == 1
    for speculative in (False, True):
        made = generate(model, prompts.tolist(), max_new_tokens=24, speculative=speculative)
        assert [list(continuation.tokens) for continuation in made.continuations] == expected
        assert bool(made.statistics.drafts_offered) == speculative

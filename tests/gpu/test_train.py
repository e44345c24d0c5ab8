"""Six steps of training on a CUDA device, held against the same steps on the CPU: one rank, the command itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

NUM_STEPS = 6
CHOICES = (
    *("model=tiny", "model.mtp_depth=0", "parallelism=one_rank", "schedule=1f1b", "dispatch=local"),
    *("data=files", "data.paths=[kernels]", "data.tokenizer_vocab_size=320", "optim/schedule=constant"),
    *("batch.sequence_length_tokens=128", "batch.global_sequences=8", "batch.micro_sequences=4"),
    *(f"task.steps={NUM_STEPS}", "validation.sequences=0", "samples.tokens=0"),
    # FP8's products and TMA need rows of 16 bytes and more.
    *("model.hidden_size=128", "model.num_layers=2", "model.dense_intermediate_size=256"),
    *("model.expert_intermediate_size=128", "model.q_lora_rank=64", "model.kv_lora_rank=64"),
    *("model.qk_nope_head_dim=32", "model.qk_rope_head_dim=16", "model.v_head_dim=32"),
)
# Both devices round at the same places, and sums in another order move only some of those roundings. So the two may
# differ by what rounding itself changes: on the CPU these six losses are within 6.6e-4 of float32's in bf16 (unit
# 2^-9), and within 1.9e-3 in FP8 (unit 2^-4 in products alone). Twice that is allowed, relative to the loss.
TOLERANCE = {"bf16": 1.5e-3, "fp8": 4e-3}


def losses(folder: Path, name: str, *choices: str) -> list[float]:
    """Trains from scratch and returns the loss of each step."""
    out_dir = folder / name
    given = [f"out_dir={out_dir}", f"data.cache_dir={folder / 'cache'}", *CHOICES, *choices]
    command = [sys.executable, "-m", "launch.train", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["loss"] for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_losses_on_the_gpu_are_near_those_on_the_cpu(precision: str, tmp_path: Path) -> None:
    expected = losses(tmp_path, "cpu", f"precision={precision}", "cluster=laptop")
    made = losses(tmp_path, "gpu", f"precision={precision}", "cluster=one_gpu")
    assert len(made) == NUM_STEPS
    assert expected[-1] < expected[0]
    for step, (found, wanted) in enumerate(zip(made, expected, strict=True)):
        assert abs(found - wanted) <= TOLERANCE[precision] * wanted, f"step {step + 1}: {found}, on the CPU {wanted}"

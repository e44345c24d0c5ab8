"""Trains torchtitan's debug model in the orders of this project: `make titan-test`.

torchtitan's own trainer loads the CSV files of `launch.schedule` on four local ranks with gloo. Each order is compared
with the same model on one rank: losses of two steps, and gradients of the first. It runs where torchtitan is installed.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from base.figures import aligned
from dualpipe.api import build
from dualpipe.export import TorchGroups, torch_csv
from tests.ports import reserved_port

RANKS, MICRO_BATCHES, TOKENS, STEPS = 4, 8, 64, 2
TOLERANCE = 1e-5
"""Largest error of a loss or gradient in float32, relative to the largest value."""
V_PLACEMENT = "ZBVZeroBubble"
"""Schedule of torchtitan by which it gives rank r the stages r and 2P-1-r."""
ORDERS: tuple[tuple[str, str, int | None, TorchGroups], ...] = (
    ("1F1B", "1f1b", None, "none"),
    ("1F1B", "zb1p", None, "none"),
    ("Interleaved1F1B", "interleaved_1f1b", 2, "none"),
    ("Interleaved1F1B", "interleaved_1f1b", 2, "all"),
    *((V_PLACEMENT, kind, None, "none") for kind in ("zb_v", "v_half", "v_min")),
    (V_PLACEMENT, "dualpipe_v", None, "pairs"),
)
"""torchtitan's schedule, which places the stages, and our order for it: kind, chunks, groups."""
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
_TIMEOUT_SECONDS = 1800.0
_GRACE_SECONDS = 60.0
THEIRS = ("1F1B", "Interleaved1F1B", V_PLACEMENT)

Outcome = tuple[list[float], dict[str, torch.Tensor]]
"""Losses of the steps on the rank that has them, and gradients of the first step by name."""


def train_rank(rank: int, jobs: Sequence[tuple[int, int, Sequence[str]]], out: Path) -> None:
    """Trains as one rank of each job: number of ranks, port and arguments of torchtitan."""
    _adapt_to_cpu()
    outcomes = []
    for world_size, port, arguments in jobs:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "localhost"} | {name: str(value) for name, value in places.items()}
        outcomes.append(_train(arguments) if rank < world_size else ([], {}))
    torch.save(outcomes, out / f"{rank}.pt")


def _train(arguments: Sequence[str]) -> Outcome:
    """Trains in torchtitan, whose own steps are recorded."""
    from torchtitan.config import ConfigManager
    from torchtitan.distributed import utils
    from torchtitan.train import Trainer

    utils.set_pg_timeouts = lambda **_: None  # its barrier names a device, which gloo refuses
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}

    class RecordingTrainer(Trainer):  # type: ignore[misc]
        def forward_backward_step(self, **batch: Any) -> torch.Tensor:
            loss = super().forward_backward_step(**batch)
            if not self.parallel_dims.pp_enabled or self.pp_has_last_stage:
                losses.append(float(loss))
            if self.step == 1:
                # Gradients of a pipeline are those of the sum over tokens.
                scale = 1 if self.parallel_dims.pp_enabled else float(batch["global_valid_tokens"])
                gradients.update((name, weight.grad * scale) for name, weight in _parameters(self))
            return loss

    trainer = RecordingTrainer(ConfigManager().parse_args(list(arguments)))
    # torchtitan's seeds differ by pipeline rank, so initial weights follow from names.
    for name, weight in _parameters(trainer):
        torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        weight.data += weight.dim() == 1
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()
    return losses, gradients


def _adapt_to_cpu() -> None:
    """Replaces what torchtitan asks of an accelerator and torch's CPU module does not have."""
    torch._utils._get_available_device_type = lambda: "cpu"
    cpu: Any = torch.cpu
    cpu.get_device_name = lambda device=None: "cpu"
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=2**34)
    cpu.memory_stats = lambda device=None: {}
    cpu.reset_peak_memory_stats = cpu.empty_cache = lambda: None


def _parameters(trainer: Any) -> list[tuple[str, Any]]:
    return [named for part in trainer.model_parts for named in part.named_parameters()]


def write_data(folder: Path) -> list[str]:
    """Writes documents and a tokenizer, and returns the overrides with which torchtitan reads them."""
    documents = [path.read_text() for path in sorted(Path("docs").glob("*.md"))]
    (folder / "data").mkdir()
    (folder / "data" / "data.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel()
    tokenizer.train_from_iterator(documents, BpeTrainer(vocab_size=2000, special_tokens=["<s>", "</s>"]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return [f"--training.dataset_path={folder / 'data'}", f"--model.hf_assets_path={folder}"]


def run(jobs: Sequence[tuple[int, Sequence[str]]]) -> list[Outcome]:
    """Returns the outcome of each job of torchtitan: number of ranks and arguments."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ports:
        placed = [(size, ports.enter_context(reserved_port()), arguments) for size, arguments in jobs]
        ranks = [context.Process(target=train_rank, args=(rank, placed, Path(folder))) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        multiprocessing.connection.wait([process.sentinel for process in ranks], _TIMEOUT_SECONDS)
        for process in ranks:  # after the first, others end within seconds, or wait for one that failed
            process.join(_GRACE_SECONDS)
            process.kill()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"torchtitan's ranks ended with {[process.exitcode for process in ranks]}")
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]
    outcomes = []
    for parts in zip(*results, strict=True):
        [losses] = [losses for losses, _ in parts if losses]
        outcomes.append((losses, {name: value for _, gradients in parts for name, value in gradients.items()}))
    return outcomes


def main() -> int:
    """Prints the errors of each order, and returns 1 if one is above the tolerance."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [
            *("--model.name=llama3", "--model.flavor=debugmodel", "--activation_checkpoint.mode=none"),
            *(f"--training.local_batch_size={MICRO_BATCHES}", f"--training.seq_len={TOKENS}"),
            *(f"--training.steps={STEPS}", "--training.mixed_precision_param=float32"),
            *(f"--job.dump_folder={folder}", *write_data(folder)),
        ]
        pipeline = [*common, f"--parallelism.pipeline_parallel_degree={RANKS}"]
        jobs = [(1, common)]
        names = [[name, "its own", ""] for name in THEIRS]
        jobs += [(RANKS, [*pipeline, f"{SCHEDULE}={name}"]) for name in THEIRS]
        for index, (place, kind, chunks, groups) in enumerate(ORDERS):
            built = build(kind, ranks=RANKS, micro_batches=MICRO_BATCHES, chunks=chunks, exchange=0.5)
            path = folder / f"{index}.csv"
            path.write_text(torch_csv(built.schedule, groups))
            jobs.append((RANKS, [*pipeline, f"{SCHEDULE}={place}", f"{SCHEDULE}_csv={path}"]))
            names.append([place, kind, groups])
        (losses, gradients), *outcomes = run(jobs)
    rows = [["torchtitan's schedule", "order", "groups", "loss", "gradient"]]
    errors = []
    for labels, (others, found) in zip(names, outcomes, strict=True):
        assert found.keys() == gradients.keys()
        loss = max(abs(ours / whole - 1) for ours, whole in zip(others, losses, strict=True))
        gradient = max(float((found[at] - whole).abs().max() / whole.abs().max()) for at, whole in gradients.items())
        errors += [loss, gradient]
        rows.append([*labels, f"{loss:.1e}", f"{gradient:.1e}"])
    print("\n".join(aligned(rows, text=(0, 1, 2))))
    return int(not max(errors) < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

"""A process that converts, loads and saves a checkpoint of many shards and prints its peak memory after each.

`VmHWM`, the largest resident set of this process, is what Linux counts; pages of files read through the kernel's cache
are not part of it. Run as `python -m tests.model.hf_memory FOLDER`; prints JSON.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from comm.dispatch.local import LocalDispatcher
from model.config import PlainRope
from model.hf.names import stored_tensors
from model.hf.reader import HfReader
from model.hf.writer import write_hf
from model.pretrained import load_hf, save_hf
from model.transformer import Transformer, named_tensors
from tests.tiny import MODEL

SHARD_BYTES = 16 * 2**20
CONFIG = replace(
    MODEL,
    vocab_size=4096,
    hidden_size=256,
    num_layers=12,
    num_dense_layers=12,
    dense_intermediate_size=3072,
    mtp_depth=0,
    rope_scaling=PlainRope(kind="plain"),
)


def status(key: str) -> int:
    """Bytes of a line of this process's memory account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def warm_up() -> None:
    """Runs everything that the measured work calls, once and small, so that loading code is not counted."""
    folder = Path(sys.argv[1]) / "warm"
    small = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float32)
    for tensor in named_tensors(small).values():
        tensor.fill_(0.5)
    save_hf(small, folder / "one", "fp8", max_shard_bytes=10_000)
    save_hf(load_hf(folder / "one", torch.float32), folder / "two")


def main() -> None:
    """Runs three steps; the last one holds all shards at once, to show that the measurement detects it."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warm_up()
    plan = stored_tensors(CONFIG, dtype="F32", fp8=False)
    generator = torch.Generator().manual_seed(0)
    base = status("VmRSS")
    write_hf(
        folder / "source",
        CONFIG,
        plan,
        lambda name: torch.empty(plan[name].shape).uniform_(-1, 1, generator=generator),
        max_shard_bytes=SHARD_BYTES,
    )
    reader = HfReader(folder / "source")
    for kind, fp8 in (("plain", False), ("fp8", True)):
        goal = stored_tensors(CONFIG, dtype="BF16", fp8=fp8)
        write_hf(folder / kind, CONFIG, goal, lambda name: reader.tensor(name, torch.float32), max_shard_bytes=2**22)
    streamed = status("VmHWM") - base
    model = load_hf(folder / "source", torch.float32)
    loaded = status("VmHWM") - base
    save_hf(model, folder / "export", max_shard_bytes=SHARD_BYTES)
    saved = status("VmHWM") - base
    copies = [tensor.clone() for tensor in named_tensors(model).values()]
    size = sum(copy.nbytes for copy in copies)
    held = status("VmHWM") - base
    num_files = len(list((folder / "source").glob("*.safetensors")))
    print(
        json.dumps(
            {"size": size, "num_files": num_files, "streamed": streamed, "loaded": loaded, "saved": saved, "held": held}
        )
    )


if __name__ == "__main__":
    main()

"""Folders of weights for tests of conversions, and a function that runs the command."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from launch.convert import main
from tests import ROOT
from tests.model.hf_checkpoints import save_checkpoint

TOKENIZER = '{"of": "no concern"}'


def convert(arguments: str) -> int:
    return main(arguments.split())


def make_sources(folder: Path) -> Path:
    """Creates `plain` (float32, MTP, five files, tokenizer), `fp8` (the same in FP8), and `of_...` (checkpoints)."""
    for name in ("plain", "fp8"):
        place = folder / name
        # 136 rows and columns: a whole block and a ragged one.
        save_checkpoint(place, fp8=name == "fp8", num_files=5, moe_intermediate_size=136)
        (place / "tokenizer.json").write_text(TOKENIZER)
        assert convert(f"from=hf path={place} to={folder / f'of_{name}'} max_shard_bytes=100000") == 0
    return folder


def run_command(folder: Path, *arguments: str, file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, with a limit of `file_bytes` per file, as on a full disk."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(
        [sys.executable, "-m", "launch.convert", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit,
    )

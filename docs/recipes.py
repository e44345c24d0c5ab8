"""Prints the table of docs/recipes.md with predicted memory: `python docs/recipes.py`.

`--write` replaces the table of the page.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
_ROW = re.compile(r"^\| `(\w+)` \|.*$", re.MULTILINE)
_STEPS, _MEMORY = 5, 6
_GB = 1e9
_PYTHON = "0.5 GB of Python"
# What a user must give and a plan depends on: the weights before an extension, and the number of steps of two epochs.
_STAND_INS = {
    "v3_32k": ["model=v3_671b_4k"],
    "v3_128k": ["model=v3_671b"],
    "quickstart_yarn": ["model=quickstart"],
    "v3_sft": ["task.steps=1000"],
}


def table(page: str) -> str:
    """Returns the page's table of recipes with the figures of the present code.

    Args:
        page: text of the page.
    """
    first = page.index("| `experiment=` |")
    text = page[first : page.index("\n\n", first)]
    with tempfile.TemporaryDirectory() as folder:
        return _ROW.sub(lambda row: _with_figures(row[0], row[1], Path(folder)), text)


def _with_figures(row: str, name: str, folder: Path) -> str:
    from launch.plan_request import read_request
    from train.predict.fit import fitted_config, gigabytes
    from train.predict.memory import predict_memory

    overrides = [f"experiment={name}", *_STAND_INS.get(name, [])]
    if name == "arithmetic_distill":
        overrides.append(f"task.teacher={_teacher(folder)}")
    config = read_request(overrides).config
    needed, room = predict_memory(fitted_config(config)).worst.total, config.cluster.memory_bytes
    cells = row.split(" | ")
    if cells[_STEPS - 1] != "from the data":
        cells[_STEPS - 1] = f"{config.task.steps:,}"
    of = f" of {room / _GB:.1f}" if room is not None else f" + {_PYTHON}"
    cells[_MEMORY - 1] = f"{gigabytes(needed)}{of}"
    return " | ".join(cells)


def _teacher(folder: Path) -> Path:
    """Returns a folder with the architecture of a teacher, and a sparse file in place of weights."""
    from launch.config.run import compose_run
    from train.checkpoint.manifest import write_weights_manifest

    write_weights_manifest(folder, compose_run(["model=arithmetic"]).model, {})
    weights = folder / "rank_00000.safetensors"
    weights.touch()
    os.truncate(weights, 2**22)  # sparse: a size that the architecture may have
    return folder


def main() -> None:
    """Prints the table, or writes it into the page."""
    sys.path.insert(0, str(ROOT))
    page = PAGE.read_text("utf-8")
    new = table(page)
    if "--write" in sys.argv:
        first = page.index("| `experiment=` |")
        PAGE.write_text(page[:first] + new + page[page.index("\n\n", first) :], "utf-8")
    else:
        print(new)


if __name__ == "__main__":
    main()

"""Notebooks of the documentation, run cell by cell in a real kernel."""

import json
import re
from pathlib import Path

import pytest

from tests import ROOT
from tests.launch.test_notebook import kernel
from tests.test_floors import FLOORS

NOTEBOOKS = ROOT / "docs" / "notebooks"
PRINTED = {
    "schedules": r"exchange 1: 1f1b 135 dualpipe 87",
    "golden_step": r"91 tensors; largest change .+, largest difference .+e-0",
    "grpo": r"reward (0\.\d+) -> (\d\.\d+), held-out pass@1 (\d\.\d+)",
}


def _cells(name: str, kind: str) -> list[str]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), f"{name}: has outputs"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_notebook_links_lead_to_files_and_every_notebook_is_run() -> None:
    assert sorted(PRINTED) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    linked = [
        link for name in PRINTED for text in _cells(name, "markdown") for link in re.findall(r"\]\((\S+)\)", text)
    ]
    assert len(linked) >= len(PRINTED)
    assert not [link for link in linked if not (NOTEBOOKS / link).is_file()]


@pytest.mark.long
@pytest.mark.parametrize("name", PRINTED)
def test_notebook_runs_in_its_folder_and_prints_what_it_shows(name: str, tmp_path: Path) -> None:
    """The folder is a copy of `docs/notebooks` in a checkout, so that outputs stay out of this one."""
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    for package in ("conf", *FLOORS):
        (tmp_path / package).symlink_to(ROOT / package)
    with kernel(folder) as notebook:
        printed = "".join(notebook.run(code) for code in _cells(name, "code"))
    match = re.search(PRINTED[name], printed)
    assert match is not None, printed[-2000:]
    if name == "grpo":
        first, last, held_out = map(float, match.groups())
        assert min(last, held_out) > first, match[0]

"""Tests of docs/recipes.md: its table is what the script prints, and its command for DeepSeek-V3 is a sane run."""

import os
import shlex
from pathlib import Path

import pytest

from docs.recipes import PAGE, table
from launch import submit
from tests.data.released_tokenizer import write_released
from tests.docs.pages import ROOT, blocks


@pytest.mark.slow
def test_recipes_table_has_the_steps_and_memory_of_the_present_code() -> None:
    page = PAGE.read_text("utf-8")
    rows = table(page).splitlines()
    assert [row for row in rows if row not in page] == []
    recipes = [path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml") if path.stem != "none"]
    assert sorted(row.split("`")[1] for row in rows[2:]) == sorted(recipes)


def test_v3_command_of_the_pages_is_a_run_that_nothing_warns_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "cluster.md", PAGE]
    found = [line for page in pages for block in blocks(page) for line in block.commands() if "submit" in line]
    (command,) = {line for line in found if "v3_671b" in line}
    assert sum("v3_671b" in line for line in found) == len(pages)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    os.truncate(tmp_path / "corpus" / "a.txt", 3 * 10**12)  # sparse
    (tmp_path / "DeepSeek-V3").mkdir()
    write_released(tmp_path / "DeepSeek-V3" / "tokenizer.json", ["some text"], highest_id=128_814)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "launch.submit"]
    assert submit.main(words[3:]) == 0
    script, said = capsys.readouterr()
    assert "--max-restarts 3 " in script
    assert {"#SBATCH --requeue", "#SBATCH --exclusive", "#SBATCH --mem=0"} <= set(script.splitlines())
    cluster = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    for line in said.splitlines():
        assert line in cluster, "the page prints other lines"

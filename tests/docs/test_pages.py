"""Links, anchors, code blocks, and the table of docs/recipes.md."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from docs import keys
from docs.recipes import PAGE, table
from launch import plan, schedule, submit
from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, make_stand_ins, runners_of
from tests.test_floors import FLOORS

LANGUAGES = {"bash", "console", "python", "text", "yaml", "json"}
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def test_page_links_lead_to_files_and_headings() -> None:
    broken = []
    for page in PAGES:
        for link in links(page):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists():
                broken.append(f"{page.name}: {link}: no such file")
            elif anchor and anchor not in anchors(target):
                broken.append(f"{page.name}: {link}: no such heading, has {sorted(anchors(target))}")
    assert not broken, "\n".join(broken)


def test_page_blocks_say_how_they_run_and_shell_commands_parse() -> None:
    for block in (block for page in PAGES for block in blocks(page)):
        assert block.language in LANGUAGES, f"{block}: language {block.language!r} is not one of {sorted(LANGUAGES)}"
        assert block.mode == "run" or len(block.reason) > 10, f"{block}: give a reason"
        assert block.mode == "run" or block.language in ("bash", "python"), f"{block}: only programs can be left out"
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{block}: {done.stderr}"


def test_page_names_tests_make_targets_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    folders = "|".join(("bench", "conf", "docker", "docs", "tests", *FLOORS))
    example = ("conf/experiment/NAME.yaml", "conf/optim/schedule/sawtooth.yaml")
    missing = []
    for page in PAGES:
        text = page.read_text("utf-8")
        named = set(re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)", text))
        paths = re.findall(rf"`((?:{folders})/[\w/.*-]+?)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
        shown_here = set(re.findall(r"`(conf/[\w/]+\.yaml)`[^`]*\n\n```", text))
        missing += [f"{page.name}: make {target}" for target in named - targets]
        missing += [
            f"{page.name}: {path}"
            for path in paths
            if path not in example and path not in shown_here and not any(ROOT.glob(path.rstrip("/")))
        ]
    assert not missing, "\n".join(missing)


def test_page_runners_read_their_page() -> None:
    for page in PAGES:
        for runner in runners_of(page):
            assert page.name in (ROOT / runner).read_text("utf-8"), runner


def test_readme_fits_one_reading() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(links(ROOT / "README.md"))
    pages = {name for name in NAMES if name.startswith("docs/")}
    assert pages <= linked, pages - linked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "figures"),
    [
        (
            plan,
            {r"pretrain .* ([\d,]+)  +[\d,]+ +\d+\.\d ": "2,663,745", r"x ([\d.]+) for what no rate explains": "1.059"},
        ),
        (schedule, {r"\n1f1b +1 +\S+ +(\d+) ": "135", r"\ndualpipe +1 +\S+ +(\d+) ": "87"}),
    ],
    ids=["plan", "schedule"],
)
def test_readme_figures_are_what_its_commands_print(
    module: object, figures: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    name = module.__name__  # type: ignore[attr-defined]
    command = re.search(rf"\| `python -m {re.escape(name)} ([^`]+)` \|", readme)
    assert command is not None
    assert module.main(shlex.split(command[1])) == 0  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    for pattern, figure in figures.items():
        value = re.search(pattern, printed)
        assert value is not None, f"{pattern} is not in\n{printed}"
        assert value[1] == figure, f"{name} prints {value[1]}, README says {figure}"
        assert figure in readme


@pytest.mark.long
def test_recipes_table_has_the_steps_and_memory_of_the_present_code() -> None:
    page = PAGE.read_text("utf-8")
    rows = table(page).splitlines()
    assert [row for row in rows if row not in page] == []
    recipes = [path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml") if path.stem != "none"]
    assert sorted(row.split("`")[1] for row in rows[2:]) == sorted(recipes)


@pytest.mark.slow
def test_keys_page_is_what_the_commands_say() -> None:
    assert keys.PAGE.read_text("utf-8") == keys.page(), "python -m docs.keys --write"


@pytest.mark.slow
def test_v3_command_of_the_pages_is_a_run_that_nothing_warns_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "cluster.md", PAGE]
    found = [line for page in pages for block in blocks(page) for line in block.commands() if "submit" in line]
    (command,) = {line for line in found if "v3_671b" in line}
    assert sum("v3_671b" in line for line in found) == len(pages)
    make_stand_ins(tmp_path)
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

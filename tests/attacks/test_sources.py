"""Checks that no source reads a file in a way that can execute it; lists each use that looks like one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("comm", "data", "dualpipe", "infer", "kernels", "launch", "model", "train")
PATTERNS = (
    r"\bc?[pP]ickle\b",
    r"\bdill\b",
    r"\bmarshal\b",
    r"\bshelve\b",
    r"\btorch\.load\b",
    r"\bweights_only=False\b",
    r"\ballow_pickle\b",
    r"\byaml\.(load|full_load|unsafe_load)\b",
    r"(?<![\w.])eval\(",
    r"(?<![\w.])exec\(",
    r"\bshell=True\b",
    r"\bos\.(system|popen)\b",
    r"\bdcp_load\(",
    r"\bDefaultLoadPlanner\(",
    r"\bFileSystemReader\(",
)
ALLOWED = {
    # A name in a path: torch writes this file, nothing here reads it.
    ("train/records/profile.py", "pickle"),
    # With a loader that makes plain values alone and refuses aliases.
    ("launch/ranks/run_folder.py", "yaml.load"),
    # Between ranks of one process group, as torch's collectives of objects do; never a file or a datagram.
    ("comm/agreement.py", "pickle"),
    # From this process to its child.
    ("train/planner/built_ranks.py", "pickle"),
    # Plugin files that the command line or conf/ names, never one that a file of a run or a checkpoint does.
    ("kernels/registry.py", "exec("),
    # Generated programs and their tests, which run in the sandbox alone (tests/infer/scoring/test_code.py).
    ("infer/scoring/code/guest/candidate.py", "exec("),
    ("infer/scoring/code/guest/script.py", "exec("),
    ("infer/scoring/code/guest/tests.py", "exec("),
}


def uses(source: str) -> set[str]:
    """Returns each pattern's matches in a source's code, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    # A base class is written as a call would be.
    code = re.sub(r"class \w+\((\w+)\)", r"\1()", ast.unparse(tree))
    return {found.group() for pattern in PATTERNS for found in re.finditer(pattern, code)}


def test_sources_run_nothing_that_a_file_holds() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = {(path.relative_to(ROOT).as_posix(), use) for path in files for use in uses(path.read_text("utf-8"))}
    assert found - ALLOWED == set(), "a use that is not listed"
    assert ALLOWED - found == set(), "listed, and no longer there"


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("import pickle", "pickle"),
        ("from pickle import load", "pickle"),
        ("x = torch.load(path, weights_only=False)", "weights_only=False"),
        ("x = numpy.load(path, allow_pickle=True)", "allow_pickle"),
        ("x = yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("x = eval (text)", "eval("),
        ("subprocess.run(x, shell = True)", "shell=True"),
    ],
)
def test_sources_a_use_is_found(source: str, use: str) -> None:
    assert use in uses(source)


def test_sources_words_in_docstrings_are_no_use() -> None:
    assert uses('"""pickle"""\n# pickle\nmodel.eval()\nre.compile("a")') == set()

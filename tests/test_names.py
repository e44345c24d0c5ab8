"""Tests that public classes have unique names, and that folders have a limited number of modules."""

import ast
from collections import Counter, defaultdict
from pathlib import Path

from tests.test_floors import ROOT, sources

MAX_MODULES = 14


def _public_classes(path: Path) -> list[str]:
    body = ast.parse(path.read_text("utf-8")).body
    return [node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sources():
        for name in _public_classes(path):
            places[name].append(path.relative_to(ROOT).as_posix())
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert not shared, shared


def test_no_folder_has_more_modules_than_one_can_take_in() -> None:
    modules = Counter(path.parent.relative_to(ROOT).as_posix() for path in sources() if path.name != "__init__.py")
    crowded = {folder: number for folder, number in modules.items() if number > MAX_MODULES}
    assert not crowded, crowded

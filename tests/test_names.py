"""Tests that public classes have unique names."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.test_floors import ROOT, sources


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

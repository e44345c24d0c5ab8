"""Tests of the manifest of a mixture: what it holds, and that a wrong one is refused in one line."""

import json
from pathlib import Path

import pytest

from data.corpus import DataError
from data.mix.manifest import Manifest, MixPhase, MixSource, parse_manifest, read_manifest

SOURCES = "sources: [{name: web, paths: [web, '~/x.txt'], weight: 3e-1}, {name: code, paths: [/c/*.py], weight: 0}]"


def manifest_of(folder: Path, text: str) -> Manifest:
    path = folder / "MIX.yaml"
    path.write_text(text, encoding="utf-8")
    return read_manifest(path)


def test_a_manifest_is_what_its_file_says(tmp_path: Path) -> None:
    end = "\nphases: [{until_tokens: 1e3, weights: {code: 2}}]\ndedup: {kind: minhash}\ndecontaminate: [t.jsonl]"
    manifest = manifest_of(tmp_path, SOURCES + end)
    web = MixSource(name="web", paths=(f"{tmp_path}/web", "~/x.txt"), weight=0.3)
    assert manifest == Manifest(
        sources=(web, MixSource(name="code", paths=("/c/*.py",), weight=0.0)),
        phases=(MixPhase(until_tokens=1000, weights={"code": 2.0}),),
        dedup="minhash",
        decontaminate=(f"{tmp_path}/t.jsonl",),
    )
    assert parse_manifest(json.loads(json.dumps(manifest.plain())), "", tmp_path) == manifest
    assert manifest.weights(manifest.phases[0]) == (0.3, 2.0)
    assert manifest.weights() == (0.3, 0.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: []", "sources: must have at least one item"),
        ("[1", "must be YAML"),
        ("sources: 2020-01-01", "must be YAML"),
        ("sources: &a [*a]", "alias"),
        ("dedup: 1\nsources: 2\ndedup: 3", "'dedup' occurs twice"),
        (SOURCES + "\ndedupe: {kind: exact}", "nearest valid: dedup"),
        (SOURCES + "\ndedup: {kind: minhsh}", "must be exact or minhash, is minhsh; nearest valid: minhash"),
        (SOURCES + "\nmax_broken_share: 2", "share: must be a number between 0 and 1, is 2; nearest valid: 1"),
        (SOURCES + "\ndecontaminate: {}", "decontaminate: must be a list"),
        (SOURCES + "\nfilters: 3", "filters: must be an object"),
        (SOURCES + "\n1: 2", "1: must be one of the fields"),
        (SOURCES.replace("weight: 0}", "weigth: 0}"), "sources[1].weigth: must be one of the fields"),
        (SOURCES.replace("weight: 0}", "weight: .nan}"), "sources[1].weight: must be a number 0 or above, is nan"),
        (SOURCES.replace("3e-1", "0"), "sources: at least one weight must be above 0"),
        (SOURCES.replace("name: code", "name: web"), "sources[1].name: must differ"),
        (SOURCES.replace("name: code", "name: my code"), "nearest: my-code"),
        (SOURCES + "\nphases: [{until_tokens: 5, weights: {cod: 1}}]", "nearest valid: code"),
        (SOURCES + "\nphases: [{until_tokens: 5, weights: {web: 0}}]", "phases[0].weights: at least one weight"),
        (SOURCES + "\nphases: [{until_tokens: 9, weights: {}}, {until_tokens: 9, weights: {}}]", "nearest: 10"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        manifest_of(tmp_path, text)
    assert words in str(caught.value)
    assert str(tmp_path / "MIX.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)

"""Tests of dropped documents in folders: counted by reason, by priority of sources, and whatever the units."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data.progress import NO_PROGRESS
from data.shards.format import PARTS, open_shards
from data.shards.run import build_folder
from data.shards.work import Build, BuildSettings, build_units
from data.tokenizer import Tokenizer
from tests.data.quality.test_contamination import QUESTIONS
from tests.data.quality.test_duplicates import EXACT, KEPT, NEAR, Writer, planted


@pytest.mark.slow
def test_dropped_documents_are_counted_and_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, kinds, originals = planted()
    writer = Writer(9)
    chosen = [number for number, kind in enumerate(kinds) if kind != KEPT and number % 8 == 0]
    sources = {
        "first": [documents[originals[number]] for number in chosen],
        "second": [f"{writer.document()} {question} {writer.document()}" for question in QUESTIONS] + ["too short"],
        "third": [documents[number] for number in chosen] + [writer.document() for _ in range(20)],
    }
    for name, rows in sources.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows))
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps({'question': text})}\n" for text in QUESTIONS))
    listed = "".join(f"- {{name: {name}, paths: [{name}.jsonl], weight: 1}}\n" for name in sources)
    cleaning = "dedup: {kind: minhash}\ndecontaminate: [questions.jsonl]\nfilters: {min_words: 3}\n"
    (tmp_path / "mix.yaml").write_text(f"sources:\n{listed}{cleaning}")
    settings = BuildSettings(
        manifest=str(tmp_path / "mix.yaml"),
        tokenizer={},
        validation_fraction=0.1,
        fim_rate=0.0,
        seed=0,
        sequence_length_tokens=64,
        unit_bytes=20_000,
    )

    def work(build: Build, workers: int) -> Iterator[object]:
        yield from build_units(build)

    monkeypatch.setattr("data.shards.run._messages", work)
    tokenizer = Tokenizer.train(sources["first"][:5], 300)
    report = build_folder(settings, tokenizer, tmp_path / "small", 1, NO_PROGRESS)["sources"]
    dropped = {name: {reason: n for reason, n in values["dropped"].items() if n} for name, values in report.items()}
    exact = sum(kinds[number] == EXACT for number in chosen)
    assert dropped == {
        "first": {},
        "second": {"contaminated": 5, "filtered": 1},
        "third": {"exact_duplicate": exact, "near_duplicate": len(chosen) - exact},
    }
    assert report["second"]["filtered"] == {"min_words": 1}
    lines = [json.loads(line) for line in (tmp_path / "small" / "duplicates.jsonl").read_text().splitlines()]
    assert [(line["kept"], line["dropped"]) for line in lines] == [
        (f"first/first.jsonl:{row}", f"third/third.jsonl:{row}") for row in range(1, len(chosen) + 1)
    ]
    assert [line["kind"] == "near" for line in lines] == [kinds[number] == NEAR for number in chosen]
    # Larger units hold the same documents, and what was dropped is not read.
    large = build_folder(replace(settings, unit_bytes=2**24), tokenizer, tmp_path / "large", 1, NO_PROGRESS)["sources"]
    assert len(report["third"]["units"]) > len(large["third"]["units"])
    for name in sources:
        for counts in (report[name], large[name]):
            del counts["units"], counts["sha256"]  # of each unit
            del counts["train"]["sequences"], counts["validation"]["sequences"]
        assert report[name] == large[name]
        lengths = [[shard.lengths.sum() for shard in open_shards(tmp_path / "small", name, part)] for part in PARTS]
        assert sum(map(sum, lengths)) == report[name]["tokens"]

"""Tests of duplicates: planted ones are found, and the decision does not depend on units or sizes in memory."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data.quality import duplicates as module
from data.quality.duplicates import EXACT, KEPT, NEAR, Duplicates, find_duplicates, full_blocks
from data.quality.filters import Inspector

VOCABULARY = [
    f"{first}{second}{third}" for first in "bdfklmnprst" for second in "aeiou" for third in ("n", "r", "st", "")
]


class Writer:
    """Writes documents of random words."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def words(self, count: int) -> str:
        return " ".join(self.rng.choice(VOCABULARY) for _ in range(count))

    def document(self) -> str:
        return "\n\n".join(
            " ".join(f"{self.words(self.rng.randint(6, 16))}." for _ in range(self.rng.randint(3, 6)))
            for _ in range(self.rng.randint(2, 6))
        )

    def near(self, document: str, kind: int) -> str:
        if kind == 0:  # a few words changed
            words = document.split(" ")
            for place in self.rng.sample(range(len(words)), max(2, len(words) // 30)):
                words[place] = self.rng.choice(VOCABULARY).upper()
            return " ".join(words)
        if kind == 1:  # sentences dropped
            sentences = re.split(r"(?<=\.)\s+", document)
            return " ".join(sentence for place, sentence in enumerate(sentences) if place % 7 != 3)
        paragraphs = document.split("\n\n")
        self.rng.shuffle(paragraphs)
        return "\n".join(paragraphs).title() + " the end"

    def templates(self, count: int) -> list[str]:
        """Returns documents that share a licence, which is more than half of each."""
        licence = self.words(120)
        return [f"# {licence}\n{self.words(60)}" for _ in range(count)]


def decide(folder: Path, units: Sequence[Sequence[str]]) -> Duplicates:
    inspections = [Inspector(None, None, with_sketches=True).inspect(unit) for unit in units]
    paths = [folder / f"{len(units)}-{number}" for number in range(len(units))]
    for path, inspection in zip(paths, inspections, strict=True):
        assert inspection.sketches is not None
        blocks, rest = full_blocks(inspection.sketches)
        path.write_bytes(blocks.tobytes() + rest.T.tobytes())
    return find_duplicates(list(map(len, units)), lambda unit: inspections[unit].hashes, paths)


def planted() -> tuple[list[str], list[int], dict[int, int]]:
    """Returns 1,700 documents, what should become of each, and the original of each duplicate."""
    writer = Writer(1)
    originals = [
        *(writer.document() for _ in range(1000)),
        *writer.templates(300),
        *dict.fromkeys(writer.words(writer.rng.randint(2, 12)) for _ in range(200)),
    ]
    documents = [(document, KEPT, -1) for document in originals]
    for kind, source in enumerate(writer.rng.sample(range(1000), 200)):
        if kind < 100:
            exact = originals[source].upper().replace(" ", "  ").replace(".", ".\n")
            documents.append((exact, EXACT, source))
        else:
            documents.append((writer.near(originals[source], kind % 3), NEAR, source))
    return (
        [text for text, _, _ in documents],
        [kind for _, kind, _ in documents],
        {number: source for number, (_, _, source) in enumerate(documents) if source >= 0},
    )


def test_planted_duplicates_are_dropped_and_others_kept(tmp_path: Path) -> None:
    documents, expected, original = planted()
    (drops,) = (decided := decide(tmp_path, [documents])).drops
    kinds = np.array(expected)
    assert (drops[kinds == EXACT] == EXACT).all()
    assert (drops[kinds == NEAR] == NEAR).sum() >= 99
    assert (drops[kinds == KEPT] != KEPT).sum() == 0
    for dropped, kept in decided.pairs():
        assert kept == (0, original[dropped[1]])


def test_decision_depends_on_the_order_of_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, _, _ = planted()
    (whole,) = decide(tmp_path, [documents]).drops
    monkeypatch.setattr(module, "_SORTED_KEYS", 700)
    monkeypatch.setattr(module, "_COMPARED_PAIRS", 40)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 256)
    units = [unit.tolist() for unit in np.split(np.array(documents, object), [1, 1, 900, 1650])]
    assert np.array_equal(np.concatenate(decide(tmp_path, units).drops), whole)


def test_dropped_documents_resemble_a_kept_earlier_document(tmp_path: Path) -> None:
    """Each document changes a few words of the one before it, so that first and last share nothing."""
    writer = Writer(2)
    versions = [writer.words(300)]
    for _ in range(60):
        versions.append(writer.near(versions[-1], 0))
    decided = decide(tmp_path, [versions, versions[:5]])
    shingles = [
        set(zip(*(version.lower().split(" ")[skip:] for skip in range(3)), strict=False)) for version in versions
    ]
    kept = [number for number, drop in enumerate(decided.drops[0]) if drop == KEPT]
    assert 3 < len(kept) < 40
    pairs = list(decided.pairs())
    assert len(pairs) == 61 - len(kept) + 5
    for copy, original in pairs:
        assert original < copy
        assert decided.drops[original[0]][original[1]] == KEPT
        first, second = shingles[original[1]], shingles[copy[1]]
        assert len(first & second) / len(first | second) > module.MIN_JACCARD - 0.15
    # No document resembles an earlier one that is kept far more than the limit.
    for place, later in enumerate(kept):
        for earlier in kept[:place]:
            assert len(shingles[earlier] & shingles[later]) / len(shingles[earlier] | shingles[later]) < 0.85


def test_units_without_documents_have_no_duplicates(tmp_path: Path) -> None:
    decided = decide(tmp_path, [[], []])
    assert [len(drops) for drops in decided.drops] == [0, 0]
    assert not list(decided.pairs())

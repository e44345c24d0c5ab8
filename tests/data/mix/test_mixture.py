"""Laws of a mixture: any ranks, batch sizes and resumed steps read the same sequences, and shards are rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from tokenizers import models

from data.config import BatchSizes
from data.corpus import DataError
from data.loader import Batch, Loader
from data.mix.manifest import Manifest, MixPhase, MixSource
from data.mix.mixture import Mixture, hold_out
from data.pack import SequenceTable
from data.shards.format import ShardRows
from data.shards.open import Prepared, PreparedPart
from data.tokenizer import SPECIAL_TOKENS, Tokenizer

L = 8
SIZES = {"web": 23, "code": 7, "maths": 11, "unused": 0}


def manifest_of(**changes: Any) -> Manifest:
    weights = {"web": 0.55, "code": 2**-0.5, "maths": 0.1, "unused": 0.0}
    sources = [MixSource(name=name, paths=("a",), weight=weight) for name, weight in weights.items()]
    phase = MixPhase(until_tokens=40 * L - 3, weights={"maths": 3.0})
    return Manifest(**{"sources": tuple(sources), "phases": (phase,), **changes})


def mixture_of(manifest: Manifest | None = None) -> Mixture:
    return Mixture(manifest or manifest_of(), SIZES, L, seed=3)


class Shard:
    """Documents of 1 to 12 tokens, of which a sequence has one, two, or a part of one."""

    def __init__(self, first: int, num_sequences: int) -> None:
        draw = np.random.default_rng(first)
        documents = draw.integers(1, 13, 3 * num_sequences)
        self.starts = np.cumsum(documents) - documents + 5  # tokens of dropped documents before them
        self.tokens = (np.arange(self.starts[-1] + 20 if num_sequences else 0) + 1000 * first).astype(np.uint32)
        pieces = []
        offsets = [0]
        for number in range(num_sequences):
            one = int(min(documents[3 * number], 5))
            pieces += [(3 * number, 0, one), (3 * number + 1, 0, int(min(documents[3 * number + 1], L - one)))]
            offsets.append(len(pieces))
        self.table = SequenceTable(
            offsets=np.array(offsets, dtype=np.uint32), pieces=np.array(pieces, dtype=np.uint32).reshape(-1, 3)
        )

    def read(self, positions: slice) -> NDArray[np.uint32]:
        return self.tokens[positions]

    def sequences(self, sequence_length_tokens: int) -> SequenceTable:
        assert sequence_length_tokens == L
        return self.table


SHARDS: list[Any] = [Shard(number, count) for number, count in enumerate((20, 3, 7, 0, 11))]


def prepared_of(mixture: Mixture) -> Prepared:
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: id_ for id_, name in enumerate(SPECIAL_TOKENS)}, merges=[]))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    counts = [len(shard.table) for shard in SHARDS]
    tokens, positions = (ShardRows(SHARDS, counts, L, pad_id) for pad_id in (0, None))
    part = PreparedPart(tokens_NL=tokens, positions_NL=positions, num_tokens=0)  # type: ignore[arg-type]
    return Prepared(
        tokenizer=Tokenizer(backend),
        train=part,
        validation=part,
        unigram_entropy_nats=1.0,
        bytes_per_token=1.0,
        fingerprint="",
        order=mixture,
        held_out=hold_out([3, 3, 3, 0], 3),
        is_mixture=True,
    )


def sources_of(mixture: Mixture, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(mixture.first_rows, rows, side="right") - 1


def rows_of(batch: Batch) -> list[list[int]]:
    rows: list[list[int]] = batch.tokens_BT.tolist()
    return rows


def test_rows_are_the_pieces_of_documents_with_padding() -> None:
    tokens, positions = (ShardRows(SHARDS, [len(shard.table) for shard in SHARDS], L, pad) for pad in (0, None))
    assert tokens.shape == (41, L)
    whole = tokens[:]
    at = positions[:]
    row = 0
    for shard in SHARDS:
        for number in range(len(shard.table)):
            filled = 0
            for document, first, count in shard.table.pieces[2 * number : 2 * number + 2].tolist():
                start = shard.starts[document] + first
                assert (whole[row, filled : filled + count] == shard.tokens[start : start + count]).all()
                assert (at[row, filled : filled + count] == np.arange(count)).all()
                filled += count
            assert (whole[row, filled:] == 0).all()
            assert (at[row, filled:] == -1).all()
            row += 1
    assert (tokens[np.array([40, 3, 3])] == whole[[40, 3, 3]]).all()
    assert (tokens[40] == whole[40]).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_any_ranks_batch_sizes_and_resumed_steps_read_the_same_order(num_ranks: int) -> None:
    steps = 20
    mixture = mixture_of()
    every = mixture.range(0, steps * 8)
    expected = ShardRows(SHARDS, [len(shard.table) for shard in SHARDS], L, 0)[every].tolist()
    loader = Loader(prepared_of(mixture), sizes=BatchSizes(8))
    share = 8 // num_ranks
    read = [rows_of(loader.batch(step, rank * share, share)) for step in range(steps) for rank in range(num_ranks)]
    assert [row for part in read for row in part] == expected
    for step in range(0, steps, num_ranks):  # a resumed run starts at any step, without those before it
        resumed = Loader(prepared_of(mixture_of()), sizes=BatchSizes(8))
        for later in range(step, min(step + 2, steps)):
            assert rows_of(resumed.batch(later, 0, 8)) == expected[8 * later : 8 * later + 8]
    small = Loader(prepared_of(mixture), sizes=BatchSizes(num_ranks))
    assert [row for step in range(9) for row in rows_of(small.batch(step, 0, num_ranks))] == expected[: 9 * num_ranks]


def test_the_written_order_is_that_of_training(tmp_path: Path) -> None:
    mixture = mixture_of()
    sizes = BatchSizes(6)
    mixture.write_order(tmp_path, sizes, 20)
    lines = [json.loads(line) for line in (tmp_path / "order.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    loader = Loader(prepared_of(mixture), sizes=sizes)
    rows = ShardRows(SHARDS, [len(shard.table) for shard in SHARDS], L, 0)
    firsts = dict(zip(mixture.names, mixture.first_rows.tolist(), strict=False))
    for step, line in enumerate(lines):
        named = [firsts[name] + index for name, index in line["sequences"]]
        assert rows_of(loader.batch(step, 0, 6)) == rows[np.array(named)].tolist()


def test_each_epoch_of_a_source_reads_every_sequence_once_in_another_order() -> None:
    mixture = mixture_of()
    rows = mixture.range(0, 400)
    sources = sources_of(mixture, rows)
    assert set(sources.tolist()) == {0, 1, 2}
    for source in range(3):
        size = mixture.sequences[source]
        read = rows[sources == source] - mixture.first_rows[source]
        epochs = [read[start : start + size].tolist() for start in range(0, len(read) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    measured = mixture.read_before(400)
    assert measured["epochs"]["code"] * 7 == (sources == 1).sum() == measured["tokens"]["code"] / L
    assert measured["tokens"]["unused"] == 0


def test_a_phase_ends_with_the_first_sequence_that_begins_after_it() -> None:
    sources = sources_of(mixture_of(), mixture_of().range(0, 80))
    shares = np.array([0.55, 2**-0.5, 3.0]) / (0.55 + 2**-0.5 + 3)
    assert np.abs(np.bincount(sources[:40], minlength=3) - 40 * shares).max() < 1
    assert (sources[40:] == 2).sum() < 5


def test_more_epochs_than_allowed_are_refused_and_the_nearest_is_accepted() -> None:
    manifest = manifest_of()
    web, *others = manifest.sources
    limited = MixSource(name="web", paths=web.paths, weight=web.weight, max_epochs=2.5)
    with pytest.raises(DataError, match=r"sources\.web\.max_epochs: .* at most 2\.5 times, reads them") as caught:
        mixture_of(manifest_of(sources=(limited, *others))).check_epochs(300)
    nearest = float(str(caught.value).split("nearest: max_epochs: ")[1].split(",")[0])
    allowed = MixSource(name="web", paths=web.paths, weight=web.weight, max_epochs=nearest)
    mixture_of(manifest_of(sources=(allowed, *others))).check_epochs(300)
    with pytest.raises(DataError, match="unused: a source with a weight must have"):
        mixture_of(manifest_of(phases=(MixPhase(until_tokens=9, weights={"unused": 1}),)))


def test_validation_takes_turns_between_the_sources() -> None:
    loader = Loader(prepared_of(mixture_of()), sizes=BatchSizes(4))
    assert loader.num_validation_sequences == 9
    assert loader.validation_sources(0, 11).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, -1, -1]
    held_out = hold_out([2, 3, 0, 1], 3)
    assert sorted(held_out.rows_N.tolist()) == list(range(6))
    assert held_out.sources_N.tolist() == [0, 1, 3, 0, 1, 1]

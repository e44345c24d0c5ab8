"""What a step asks of the model, in numbers worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.corpus import DataError
from data.loader import Batch
from tests.tiny import TASK, tiny_config, write_text
from train.corpus import prepare_corpus
from train.records.json_lines import JsonLines
from train.step import make_objective, to_micro_batch


def test_micro_batch_shifts_inputs_by_depth_and_targets_by_one_more() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    made = to_micro_batch(Batch(tokens_BT=tokens, positions_BT=positions, pad_id=2), 2, torch.device("cpu"))
    assert [depth.tolist() for depth in made.inputs_BT] == [
        [[10, 11, 12, 13, 20, 21, 22]],
        [[11, 12, 13, 20, 21, 22, 2]],
        [[12, 13, 20, 21, 22, 2, 2]],
    ]
    none = -100
    assert [depth.tolist() for depth in made.targets_BT] == [
        [[11, 12, 13, none, 21, 22, none]],
        [[12, 13, none, none, 22, none, none]],
        [[13, none, none, none, none, none, none]],
    ]


def test_micro_batch_knows_its_documents_where_they_are_masked() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, -1]])
    batch = Batch(tokens_BT=torch.zeros_like(positions), positions_BT=positions, pad_id=2)
    masked, plain = (
        to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=masks_documents)
        for masks_documents in (True, False)
    )
    assert masked.documents is not None
    assert masked.documents.ids_BT.tolist() == [[1, 1, 1, 1, 2, 2, 3]]
    assert plain.documents is None


def test_objective_divides_by_global_counts() -> None:
    objective = make_objective(TASK, torch.tensor([50, 40, 20]), 0.3, 16)
    assert objective.factors == pytest.approx((1 / 50, 0.3 / 2 / 40, 0.3 / 2 / 20))
    assert objective.balance == pytest.approx(0.01 / 16)


def test_validation_part_too_small_for_a_pass_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path, 20)
    config = tiny_config(tmp_path)
    batch, validation = replace(config.batch, global_sequences=512), replace(config.validation, sequences=512)
    with pytest.raises(DataError, match=r"validation\.sequences.*512.*nearest valid"):
        prepare_corpus(replace(config, batch=batch, validation=validation))
    prepare_corpus(replace(config, batch=batch))


def test_run_that_goes_on_in_its_folder_takes_back_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first_step, steps in ((0, range(1, 7)), (4, range(5, 9))):
        lines = JsonLines(path, first_step)
        for step in steps:
            lines.record({"step": step, "after": first_step})
        lines.close()
        if first_step == 0:
            with path.open("a") as file:
                file.write('{"step": 7, "cut of')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["after"] for record in records] == [0] * 4 + [4] * 4

"""Computes a teacher's most probable tokens at every target of prepared samples, in one process.

Shape legend: N sequences, L tokens per sequence, B sequences of a batch, T tokens, R rows with a target, K kept tokens.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.loader import IGNORE, Batch
from data.prepare import Prepared
from data.progress import Progress
from data.samples.pack import WEIGHTS
from kernels.attention.documents import Documents
from kernels.cross_entropy.reference import chunk_rows
from model.transformer import Transformer
from train.teacher.scores import PARTS, ScoresMeta, ScoresWriter


@torch.no_grad()
def write_scores(
    model: Transformer, prepared: Prepared, meta: ScoresMeta, writer: ScoresWriter, batch_size: int, progress: Progress
) -> int:
    """Writes the scores of both parts of the samples.

    Returns:
        The number of targets that were scored.
    """
    device, num_targets = model.head_weight.device, 0
    for part in PARTS:
        tokens_NL, positions_NL, weights_NL = _arrays(prepared, part == "train")
        ids_NLK, log_probs_NLK = writer.arrays(part, *tokens_NL.shape)
        starts = range(0, len(tokens_NL), batch_size)
        for first in progress.over(f"scores of {part}", starts, len(starts), lambda first: 1, "batches"):
            rows = slice(first, first + batch_size)
            batch = Batch(
                tokens_BT=torch.from_numpy(tokens_NL[rows].astype(np.int64)),
                positions_BT=torch.from_numpy(positions_NL[rows].astype(np.int64)),
                pad_id=prepared.tokenizer.pad_id,
            )
            is_target_BT = (batch.targets(1) != IGNORE) & torch.from_numpy(weights_NL[rows] != 0)
            documents = Documents.from_positions(batch.positions_BT).to(device)
            states_BTD = model.final_states(batch.tokens_BT.to(device), documents)
            ids_RK, log_probs_RK = _top(states_BTD[is_target_BT.to(device)], model.head_weight, meta)
            ids_NLK[rows][is_target_BT.numpy()] = ids_RK.int().cpu().numpy()
            log_probs_NLK[rows][is_target_BT.numpy()] = log_probs_RK.float().cpu().numpy()
            num_targets += len(ids_RK)
    return num_targets


def _arrays(prepared: Prepared, is_train: bool) -> tuple[NDArray[np.generic], ...]:  # noqa: FBT001
    if is_train:
        return prepared.train_tokens_NL, prepared.train_positions_NL, prepared.train_values[WEIGHTS]
    return prepared.validation_tokens_NL, prepared.validation_positions_NL, prepared.validation_values[WEIGHTS]


def _top(states_RD: Tensor, head_VD: Tensor, meta: ScoresMeta) -> tuple[Tensor, Tensor]:
    """Returns the most probable tokens of each row and their log-probabilities, chunk by chunk."""
    wide = torch.promote_types(states_RD.dtype, torch.float32)
    ids_RK = torch.empty(len(states_RD), meta.kept, dtype=torch.int64, device=states_RD.device)
    log_probs_RK = torch.empty(len(states_RD), meta.kept, dtype=wide, device=states_RD.device)
    size = max(1, chunk_rows(len(states_RD), len(head_VD), states_RD.dtype))
    for first in range(0, len(states_RD), size):
        chunk = slice(first, first + size)
        logits_CV = (states_RD[chunk] @ head_VD.t()).to(wide) / meta.temperature
        top = logits_CV.log_softmax(-1).topk(meta.kept, -1)
        ids_RK[chunk], log_probs_RK[chunk] = top.indices, top.values
    return ids_RK, log_probs_RK

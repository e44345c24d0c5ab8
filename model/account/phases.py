"""What each phase of a stage keeps of one micro-batch, and when it lets go: the phases of `model.stage`, in bytes.

`tests/train/memory` compares every number with the storages that are alive in a run. No torch here.
"""

from model.account import fp8_phases, own_phases
from model.account.ends import embedding_phase, head_phase
from model.account.phase import PhaseBytes
from model.account.sizes import Sizes
from model.account.stage_shape import StageShape


def stage_phases(sizes: Sizes, stage: StageShape) -> list[PhaseBytes]:
    """Returns the phases of a stage, in forward order.

    Args:
        sizes: of the micro-batch.
        stage: its layers and ends.
    """
    config = sizes.config
    phases = [embedding_phase(sizes)] if stage.is_first else []
    for layer in stage.layers:
        phases += _dense_phases(sizes) if layer < config.num_dense_layers else _moe_phases(sizes)
    if stage.is_last:
        for depth in range(config.mtp_depth + 1):
            phases += _moe_phases(sizes) if depth else []
            phases.append(head_phase(sizes, depth))
    return phases


def _dense_phases(sizes: Sizes) -> list[PhaseBytes]:
    return [fp8_phases.dense_phase(sizes) if sizes.is_fp8 else own_phases.dense_phase(sizes)]


def _moe_phases(sizes: Sizes) -> list[PhaseBytes]:
    own = own_phases if not sizes.is_fp8 else fp8_phases
    return [own.attend_phase(sizes), own.dispatch_phase(sizes), own.experts_phase(sizes), own.combine_phase(sizes)]

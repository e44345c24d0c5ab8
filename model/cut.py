"""Which layers make up which stage. No torch here: a wrong cut is refused before any process starts."""


class CutError(ValueError):
    """A model that cannot be cut into the stages asked for."""


def cut_layers(num_layers: int, num_stages: int, mtp_depth: int = 0, *, stages_per_rank: int = 1) -> tuple[range, ...]:
    """Cuts layers into contiguous, nearly equal stages.

    An MTP module weighs as much as a layer and lives on the last stage, which therefore gets fewer
    layers; what cannot be shared equally goes to the first stages.

    Args:
        num_layers: of the model, without its MTP modules.
        num_stages: at least 1.
        mtp_depth: number of MTP modules.
        stages_per_rank: that the schedule gives to a pipeline rank; errors use it to name the nearest pipeline.

    Returns:
        The layers of each stage, at least one for each.

    Raises:
        CutError: fewer layers than stages.
    """
    if num_layers < num_stages:
        shorter = num_layers // stages_per_rank
        raise CutError(
            f"model.num_layers: {num_layers} layers cannot be cut into {num_stages} pipeline stages of at least one "
            f"layer; nearest valid: model.num_layers={num_stages}"
            f"{f' or parallelism.pipeline={shorter}' if shorter else ''}"
        )
    last = max(1, min(num_layers - (num_stages - 1), (num_layers + mtp_depth) // num_stages - mtp_depth))
    sizes = [num_layers] if num_stages == 1 else [*_share(num_layers - last, num_stages - 1), last]
    stages, first = [], 0
    for size in sizes:
        stages.append(range(first, first + size))
        first += size
    return tuple(stages)


def _share(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]

"""Rules of a run's exchange: which backend can serve it, and that the gate keeps the cap on nodes. No torch here."""

from comm.config import DeepEPDispatchConfig, LocalDispatchConfig
from comm.dispatch.deepep.package import DeepEPError, check_available
from comm.dispatch.node_bound import most_nodes
from comm.layout import Layout
from launch.config.errors import ConfigError
from train.config import TrainConfig


def check_exchange(config: TrainConfig) -> None:
    """Refuses an exchange that the run cannot have.

    Raises:
        ConfigError: a backend that does not fit the run or this machine, or tokens that may touch too many nodes.
    """
    match config.dispatch:
        case LocalDispatchConfig():
            _check_local(config)
        case DeepEPDispatchConfig():
            _check_deepep(config)
    if not isinstance(config.dispatch, LocalDispatchConfig) and config.dispatch.node_cap == "verify":
        _check_node_cap(config, config.dispatch.max_nodes)


def _check_local(config: TrainConfig) -> None:
    if config.parallelism.expert > 1:
        raise ConfigError(
            f"dispatch: local keeps every expert on each rank and needs parallelism.expert=1, "
            f"is local with parallelism.expert={config.parallelism.expert}; nearest valid: dispatch=two_hop"
        )


def _check_deepep(config: TrainConfig) -> None:
    cluster = config.cluster
    if (cluster.device, cluster.backend) != ("cuda", "nccl"):
        raise ConfigError(
            f"dispatch: deepep needs cluster.device=cuda and cluster.backend=nccl, is deepep with "
            f"cluster.device={cluster.device} and cluster.backend={cluster.backend}; nearest valid: dispatch=two_hop"
        )
    if config.precision.kind not in ("bf16", "fp8"):
        raise ConfigError(
            f"dispatch: deepep moves bf16 rows and needs precision=bf16 or fp8, is deepep with "
            f"precision={config.precision.kind}; nearest valid: dispatch=two_hop"
        )
    try:
        check_available()
        _ = config.deepep_buffer
    except DeepEPError as error:
        raise ConfigError(str(error)) from error


def _check_node_cap(config: TrainConfig, max_nodes: int) -> None:
    """A gate that may choose more nodes than the cap would end the run at the first such token: it is refused here."""
    model, layout = config.model, Layout(config.parallelism, config.cluster.ranks_per_node)
    nodes = {
        layout.expert_group(rank): tuple(layout.node_of(member) for member in layout.expert_group(rank))
        for rank in range(layout.world_size)
    }
    most = max(
        most_nodes(
            model.num_routed_experts,
            model.num_expert_groups,
            model.num_limited_groups,
            model.num_experts_per_token,
            members,
        )
        for members in nodes.values()
    )
    if most > max_nodes:
        raise ConfigError(
            f"dispatch.max_nodes: the gate can send a token to {most} nodes (model.num_limited_groups="
            f"{model.num_limited_groups} of {model.num_expert_groups} groups of experts, parallelism.expert="
            f"{config.parallelism.expert} ranks, cluster.ranks_per_node={config.cluster.ranks_per_node}), "
            f"is {max_nodes}; nearest valid: {most}, or a smaller model.num_limited_groups, or dispatch.node_cap=clip"
        )

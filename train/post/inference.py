"""Opens a network of which each rank holds a part, to generate with weights too large for one rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed as dist

from comm.config import AllToAllDispatchConfig, DispatchConfig, LocalDispatchConfig
from comm.dispatch.registry import TokenSizes
from comm.groups import start, stop
from comm.layout import Layout
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.membership import STORE_FILE_VARIABLE
from dualpipe.build import build
from infer.batch import PROMPT_TOKENS
from model.config import Computing, products_of
from model.hf.reader import HfReader
from model.transformer import named_tensors
from train.checkpoint.sources import CheckpointReader, is_hf_folder, open_source, source_folder
from train.config import BatchConfig, InferenceConfig, PrecisionConfig
from train.post.pipeline import ReplicaPipeline
from train.replica import open_replica
from train.world import ReplicaConfig, build_groups, open_world


@contextmanager
def open_pipeline(config: InferenceConfig) -> Iterator[ReplicaPipeline]:
    """Joins the job, loads this rank's part of the weights, and leaves the job at the end.

    Every rank calls it, and calls the same collectives inside.
    """
    store_file = os.environ.get(STORE_FILE_VARIABLE)
    world_size = config.parallelism.world_size
    store = dist.FileStore(store_file, world_size) if store_file else None  # type: ignore[attr-defined]
    device = start(config.cluster, store)
    # The schedule only defines the placement; twice as many micro-batches as ranks are valid for every kind.
    schedule = build(config.kind, config.parallelism.pipeline, 2 * config.parallelism.pipeline)
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    seconds = config.cluster.timeout_seconds
    groups = build_groups(layout, schedule, config.model.mtp_depth, seconds)
    world = open_world(layout, groups, device, seconds, CollectiveLog())
    replica = open_replica(world, _replica_config(config), schedule, config.cut)
    _open_weights(config).fill(named_tensors(replica.model))
    pipeline = ReplicaPipeline(replica)
    yield pipeline
    dist.barrier(group=groups.world)
    pipeline.close()
    replica.close()
    world.close()
    stop()


def _open_weights(config: InferenceConfig) -> HfReader | CheckpointReader:
    if is_hf_folder(config.ckpt):
        return open_source(config.ckpt, "ckpt", drop_mtp=config.model.mtp_depth == 0)
    return CheckpointReader(Path(source_folder(config.ckpt, "ckpt")), "ckpt", config.weights)


def _replica_config(config: InferenceConfig) -> ReplicaConfig:
    model = config.model
    products = products_of(config.dtype)
    dispatch: DispatchConfig = (
        AllToAllDispatchConfig(
            kind="all_to_all", payload="full", max_nodes=config.parallelism.expert, node_cap="verify"
        )
        if config.parallelism.expert > 1
        else LocalDispatchConfig(kind="local", payload="full")
    )
    return ReplicaConfig(
        model=model,
        computing=Computing(products=products),
        precision=PrecisionConfig(kind=config.dtype if config.dtype in ("float64", "float32") else "bf16"),
        dispatch=dispatch,
        tokens=TokenSizes(
            max_tokens=PROMPT_TOKENS, hidden_size=model.hidden_size, num_choices=model.num_experts_per_token
        ),
        # Sizes of training, which is not run.
        batch=BatchConfig(
            sequence_length_tokens=1, global_sequences=1, ramp=None, micro_sequences=1, document_mask=False
        ),
        pairing="sequential",
        seed=None,
    )

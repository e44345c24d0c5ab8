"""Replays in training the experts that the sampler chose, and keeps their records for a resumed run.

A rank records its own layers of the sequences that it samples, and training packs answers into other sequences. So
ranks that hold the same layers exchange records; every size follows from the layout and the answers.

In files, each rank writes its own records. Any rank reads any record, because a file names it by prompt, sample and
layer. So the job may resume with another layout.

Source: arXiv:2510.11370 (rollout routing replay). Shape legend: B sequences, T tokens, K experts per token, E experts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch import distributed as dist

from base.files import replace_file
from comm.protocol import Label
from infer.cohorts import assign_prompt
from infer.protocol import PROMPT_SAMPLE, RouteKey, SampledRoutes
from model.config import ModelConfig
from model.router import FREE_CHOICE, ReplayedRoutes, RouteError, Router, Routing, expert_id_dtype
from train.core.replica import Replica
from train.errors import UnsavedError
from train.files.run_files import RankFiles, find_rank_files
from train.post.journal import FOLDER_NAME
from train.post.sample import AnswerPlace, RolloutRoutes, ScoredRollout

Records = Mapping[RouteKey, NDArray[np.generic]]
"""Experts of the tokens of each record, TK."""
Share = tuple[int, int]
"""Data index and direction: the ranks of a pipeline that run a sequence."""

_PROMPT = "prompt"
_ORIGIN = "origin"


def replay_answers(replica: Replica, routes: RolloutRoutes, answers: Sequence[AnswerPlace]) -> "TrainedRoutes":
    """Returns the experts of the tokens that this rank trains. All ranks call it."""
    return exchange_routes(replica, routes.sampled, assign_homes(replica, routes.requests), answers)


@dataclass(frozen=True, slots=True)
class BatchRoutes:
    """Replays the sampler's choices in the tokens of answers (see `model.router.Routes`).

    Routers choose for padding, for the last token of an answer, and in MTP modules.
    """

    ids: Records
    answers: Mapping[tuple[int, int], Sequence[tuple[int, AnswerPlace]]]
    config: ModelConfig

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        """Implements `Routes.route`."""
        if label.layer >= self.config.num_layers:
            return router.route(logits_BTE)
        ids_NK = self.forced_ids(label, logits_BTE.shape[:2])
        return ReplayedRoutes({label: ids_NK.to(logits_BTE.device)}).route(label, router, logits_BTE)

    def forced_ids(self, label: Label, shape: Sequence[int]) -> Tensor:
        """Returns the experts of each token of a micro-batch, int64 NK; -1 where the router chooses."""
        num_choices = self.config.num_experts_per_token
        forced_BTK = np.full((*shape, num_choices), FREE_CHOICE, dtype=np.int64)
        for row, answer in self.answers.get((label.direction, label.micro_batch), ()):
            for sample, first, num_tokens in answer.records():
                key = RouteKey(answer.prompt, sample, label.layer)
                ids_TK = checked_record(self.ids, key, num_tokens)
                if first + num_tokens > shape[1] or ids_TK.shape[1] != num_choices:
                    raise RouteError(
                        f"{label}: record of prompt {key.prompt}, sample {key.sample} has the shape "
                        f"{list(ids_TK.shape)}, does not fit into {list(forced_BTK.shape)} at token {first}"
                    )
                forced_BTK[row, first : first + num_tokens] = ids_TK
        return torch.from_numpy(forced_BTK).flatten(0, 1)


def checked_record(ids: Records, key: RouteKey, num_tokens: int) -> NDArray[np.generic]:
    """Returns a record, TK; raises RouteError if it is missing or has another length."""
    name = f"prompt {key.prompt}, sample {key.sample}, layer {key.layer}"
    if key not in ids:
        raise RouteError(f"{name}: no experts are recorded")
    if len(ids[key]) != num_tokens:
        raise RouteError(f"{name}: must have the experts of {num_tokens} tokens, has those of {len(ids[key])}")
    return ids[key]


class RoutePlan:
    """Which records each rank holds and needs, as a pure function of the layout and of all answers."""

    def __init__(self, replica: Replica, homes: Mapping[int, Share], answers: Sequence[AnswerPlace]) -> None:
        self._replica = replica
        self._homes = homes
        self._answers = answers
        self._layers = moe_layers(replica)
        self._needed: dict[Share, dict[tuple[int, int], int]] = defaultdict(dict)
        for answer in answers:
            share, _, _ = self._destination(answer.row)
            for sample, _, num_tokens in answer.records():
                self._needed[share][answer.prompt, sample] = num_tokens

    def pieces(self, source: int, destination: int) -> dict[RouteKey, int]:
        """Returns the records that a rank has and another needs, in order, with their tokens."""
        layout = self._replica.world.layout
        # A dict, because both directions may need a prompt in a stage that they share.
        pieces: dict[RouteKey, int] = {}
        for direction, row in enumerate(self._replica.schedule.placement):
            for stage, pipeline_index in enumerate(row):
                if pipeline_index != layout.pipeline_index(destination):
                    continue
                for (prompt, sample), num_tokens in self._needed[layout.data_index(destination), direction].items():
                    data_index, home = self._homes[prompt]
                    if layout.rank(self._replica.schedule.placement[home][stage], data_index) == source:
                        pieces |= {RouteKey(prompt, sample, layer): num_tokens for layer in self._layers[stage]}
        return pieces

    def rows_of(self, batch: int) -> dict[tuple[int, int], list[tuple[int, AnswerPlace]]]:
        """Returns the answers that this rank's pipeline trains in a batch, by direction and micro-batch."""
        rows: dict[tuple[int, int], list[tuple[int, AnswerPlace]]] = defaultdict(list)
        for answer in self._answers:
            (data_index, direction), micro_batch, row = self._destination(answer.row)
            if answer.batch == batch and data_index == self._replica.world.data_index:
                rows[direction, micro_batch].append((row, answer))
        return rows

    def _destination(self, row: int) -> tuple[Share, int, int]:
        """Returns which ranks train a sequence, in which micro-batch, and its number within that."""
        schedule = self._replica.schedule
        size = self._replica.config.batch.micro_sequences
        data_index, micro_batch = divmod(row // size, schedule.num_micro_batches)
        for direction in range(schedule.num_directions):
            count = len(schedule.micro_batches_of(direction))
            if micro_batch < count:
                return (data_index, direction), micro_batch, row % size
            micro_batch -= count
        raise AssertionError(f"sequence {row} is in no micro-batch")


@dataclass(frozen=True, slots=True)
class TrainedRoutes:
    """The experts of the tokens that this rank trains, for all batches of a step."""

    plan: RoutePlan
    ids: Records
    config: ModelConfig

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all records."""
        return sum(ids_TK.nbytes for ids_TK in self.ids.values())

    def of_batch(self, batch: int) -> BatchRoutes:
        """Returns the routes of a batch."""
        return BatchRoutes(self.ids, self.plan.rows_of(batch), self.config)


def exchange_routes(
    replica: Replica, sampled: SampledRoutes, homes: Mapping[int, Share], answers: Sequence[AnswerPlace]
) -> TrainedRoutes:
    """Exchanges records within the group of ranks that hold the same stages. All ranks call it.

    The arguments are those of `RoutePlan`, with the records of this rank.
    """
    world = replica.world
    plan = RoutePlan(replica, homes, answers)
    members = dist.get_process_group_ranks(world.groups.stage)
    outgoing = [plan.pieces(world.rank, rank) for rank in members]
    sent = [[checked_record(sampled.ids, *piece) for piece in pieces.items()] for pieces in outgoing]
    # Own records are not sent.
    here = members.index(world.rank)
    ids = dict(zip(outgoing[here], sent[here], strict=True))
    sent[here] = []
    incoming = [{} if rank == world.rank else plan.pieces(rank, world.rank) for rank in members]
    return TrainedRoutes(plan, ids | _exchange(replica, sent, incoming), replica.config.model)


def _exchange(
    replica: Replica, sent: Sequence[Sequence[NDArray[np.generic]]], incoming: Sequence[Mapping[RouteKey, int]]
) -> dict[RouteKey, NDArray[np.generic]]:
    """Sends records to each member of the stage's group, and returns those that arrive."""
    world = replica.world
    config = replica.config.model
    if len(sent) == 1:
        return {}
    dtype = expert_id_dtype(config.num_routed_experts)
    token_bytes = config.num_experts_per_token * dtype.itemsize
    input_splits = [sum(ids_TK.nbytes for ids_TK in part) for part in sent]
    output_splits = [token_bytes * sum(part.values()) for part in incoming]
    flat = [torch.from_numpy(ids_TK).view(torch.uint8).flatten() for part in sent for ids_TK in part]
    sending = torch.cat([torch.empty(0, dtype=torch.uint8), *flat]).to(world.device)
    arrived = torch.empty(sum(output_splits), dtype=torch.uint8, device=world.device)
    # The group belongs to the reductions of gradients, which are complete when the weights are.
    replica.weight_updates.wait_all()
    with world.log.collective("stage", world.groups.stage, "experts of tokens"):
        dist.all_to_all_single(arrived, sending, output_splits, input_splits, group=world.groups.stage)
    pieces = [piece for part in incoming for piece in part.items()]
    parts = arrived.cpu().split([token_bytes * num_tokens for _, num_tokens in pieces])  # host sync
    return {
        key: part.view(dtype).view(num_tokens, -1).numpy()
        for (key, num_tokens), part in zip(pieces, parts, strict=True)
    }


def assign_homes(replica: Replica, requests: Iterable[Sequence[int]]) -> dict[int, Share]:
    """Returns the data index and direction that sample the answers to each prompt."""
    num_data = replica.world.layout.parallelism.data
    return {
        number: assign_prompt(position, num_data, replica.schedule.num_directions)
        for request in requests
        for position, number in enumerate(request)
    }


def held_records(
    replica: Replica, homes: Mapping[int, Share], lengths: Iterable[tuple[int, int, Sequence[int]]]
) -> dict[RouteKey, int]:
    """Returns the records that this rank has after sampling, with their numbers of tokens."""
    world = replica.world
    layers = moe_layers(replica)
    records: dict[RouteKey, int] = {}
    for prompt, prompt_tokens, answers in lengths:
        data_index, direction = homes[prompt]
        if data_index != world.data_index:
            continue
        read = {PROMPT_SAMPLE: prompt_tokens} | {sample: tokens - 1 for sample, tokens in enumerate(answers)}
        for stage, pipeline_index in enumerate(replica.schedule.placement[direction]):
            if pipeline_index == world.pipeline_index:
                records |= {
                    RouteKey(prompt, sample, layer): num_tokens
                    for sample, num_tokens in read.items()
                    for layer in layers[stage]
                    if num_tokens > 0
                }
    return records


def moe_layers(replica: Replica) -> tuple[tuple[int, ...], ...]:
    """Returns the MoE layers of the main model in each stage."""
    config = replica.config.model
    routed = range(config.num_dense_layers, config.num_layers)
    return tuple(tuple(layer for layer in stage if layer in routed) for stage in replica.cut)


def save_rollout_routes(replica: Replica, out_dir: Path, rollout: ScoredRollout) -> None:
    """Writes this rank's records of a rollout. All ranks call it, before the journal is written."""
    assert rollout.routes is not None
    world = replica.world
    header = rollout.header
    problem = ""
    try:
        write_routes(out_dir / FOLDER_NAME, header.step, world.files, rollout.routes.sampled, header.origin)
    except OSError as error:
        problem = f": {error}"
    failed = int(world.reduce(torch.tensor(int(bool(problem))), "records of experts that were not written"))
    if failed:
        raise UnsavedError(f"{out_dir}: takes no records of experts from {failed} of {len(world.ranks)} ranks{problem}")


def load_rollout_routes(replica: Replica, out_dir: Path, rollout: ScoredRollout) -> RolloutRoutes | None:
    """Reads this rank's records; None on every rank if one is missing. All ranks call it."""
    world = replica.world
    header = rollout.header
    requests = (tuple(group.number for group in rollout.groups),)
    lengths = [(scored.number, len(scored.tokens), [a.num_tokens for a in scored.answers]) for scored in rollout.groups]
    needed = held_records(replica, assign_homes(replica, requests), lengths)
    routes = None
    try:
        sampled = read_routes(out_dir / FOLDER_NAME, header.step, world.files, needed, header.origin)
        routes = RolloutRoutes(sampled=sampled, requests=requests)
    except RouteError:
        routes = None
    missing = int(world.reduce(torch.tensor(int(routes is None)), "records of experts that are missing"))
    return None if missing else routes


def write_routes(folder: Path, step: int, files: RankFiles, routes: SampledRoutes, origin: str) -> Path:
    """Writes the records of a rank. When this returns, the file is whole and on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = files.make_folder(folder) / _file_name(step, files.rank)
    records = {_to_name(key): ids_TK for key, ids_TK in routes.ids.items()}
    # A rank whose stages have no MoE layer has no records, which safetensors cannot write with metadata.
    checksums = {name: _checksum(ids_TK) for name, ids_TK in records.items()}
    replace_file(path, save(records, checksums | {_ORIGIN: origin} if records else None))
    return path


def read_routes(folder: Path, step: int, files: RankFiles, held: Mapping[RouteKey, int], origin: str) -> SampledRoutes:
    """Reads records from the files of all ranks.

    The rank's own file is read first, because it has all records if the layout is the same. Files of another origin are
    ignored. A run that was rolled back may have left some.
    """
    records: dict[RouteKey, NDArray[np.generic]] = {}
    for path in _paths(folder, step, files):
        missing = [key for key in held if key not in records]
        if not missing:
            break
        try:
            with safe_open(path, "numpy") as file:
                checksums = file.metadata() or {}
                if checksums.get(_ORIGIN) != origin:
                    continue
                read = {key: file.get_tensor(_to_name(key)) for key in missing if _to_name(key) in checksums}
        except (OSError, SafetensorError) as error:
            raise RouteError(f"{path}: cannot be read: {error}") from error
        for key, ids_TK in read.items():
            if _checksum(ids_TK) != checksums[_to_name(key)]:
                raise RouteError(f"{path}: {_to_name(key)} was changed after it was written")
        records |= read
    return SampledRoutes(ids={key: checked_record(records, key, num_tokens) for key, num_tokens in held.items()})


def _paths(folder: Path, step: int, files: RankFiles) -> Iterator[Path]:
    own_path = files.folder(folder) / _file_name(step, files.rank)
    if own_path.exists():
        yield own_path
    yield from sorted(path for path in find_rank_files(folder, _file_name(step, "*")) if path != own_path)


def _file_name(step: int, rank: int | str) -> str:
    return f"step-{step:08}.routes-{rank}.safetensors"


def _checksum(ids_TK: NDArray[np.generic]) -> str:
    return str(crc32(np.ascontiguousarray(ids_TK).tobytes()))


def _to_name(key: RouteKey) -> str:
    sample = _PROMPT if key.sample == PROMPT_SAMPLE else key.sample
    return f"{key.prompt}.{sample}.{key.layer}"

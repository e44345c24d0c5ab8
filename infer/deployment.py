"""Sizes deployments: fewest GPUs that hold a model and its cache, and bounds of speed. No torch here.

A role, prefill or decoding, has a set of GPUs. Routed experts are spread over all of them, with redundant copies if
they do not divide. In the published decoding, the shared experts are routed ones too, in slots of such copies, and each
GPU of the published prefill has a redundant expert. All else is divided over a group of GPUs by heads or columns,
except norms, routers and projections to latents. Groups take different sequences; members of one cache the same
latents, which have no heads. A pass takes at least the longest of three times, as if all else overlapped: to read
weights and cache from memory, to send rows over links, to compute. Source of the layout: arXiv:2412.19437, section 3.4.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

from base.figures import aligned, bytes_text
from base.ranges import PositiveInt, PositiveShare
from base.refusal import RuleError
from comm.config import ClusterConfig
from model.config import ModelConfig
from model.hf.checkpoint import ITEM_BYTES
from model.hf.names import StoredDtype, copied_from, stored_tensors
from model.size import count_parameters, training_flops_per_token

Role = Literal["prefill", "decoding"]
_MOST_GPUS = 4096
_SMALLEST = "smallest"
_PUBLISHED = {"prefill": 32, "decoding": 320}
_PUBLISHED_ATTENTION = {"as DeepSeek-V3": 4, "without groups": 1}
"""GPUs of a group in sets of the published sizes, by name. The second set shows what groups save and cost."""
_PUBLISHED_REDUNDANT = {"prefill": 32, "decoding": 0}
"""Redundant experts besides those that fill the last slots."""
_RATES = (
    *("memory_bytes", "memory_bytes_per_second", "peak_flops"),
    *("inter_node_bytes_per_second", "intra_node_bytes_per_second"),
)
_LATENT_BYTES = 2
_ROW_BYTES = 2
_DTYPES: Mapping[str, StoredDtype] = {"fp8": "BF16", "bf16": "BF16", "float32": "F32", "float64": "F64"}
_REPLICATED = re.compile(r"norm|\.mlp\.gate\.|_a_proj|eh_proj")
"""Tensors that every member of a group holds whole: norms, routers, and projections to latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentConfig:
    """What a deployment must hold. `conf/plan.yaml` explains the keys."""

    cached_tokens: PositiveInt = 1_000_000
    context_tokens: PositiveInt = 4096
    prefill_tokens: PositiveInt = 8192
    memory_share: PositiveShare = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedWeights:
    """Bytes of weights: of an expert, of what a group divides, or of what its members hold whole.

    A group divides the embedding and the shared experts too.
    """

    expert: float
    num_layers: int
    embedding: int
    divided: int
    shared: int
    replicated: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSet:
    """A set of GPUs for a role. Bytes and experts are those of a GPU, tokens and copies those of all."""

    role: Role
    name: str
    gpus: int
    attention: int
    experts: int
    copies: int
    weight_bytes: float
    cached_tokens: int
    tokens_per_second: float
    pass_seconds: float
    limit: str


class Deployment:
    """A model on a kind of devices."""

    def __init__(self, model: ModelConfig, cluster: ClusterConfig, precision: str, config: DeploymentConfig) -> None:
        """Raises `RuleError` if the cluster does not state what the bounds need."""
        if missing := next((key for key in _RATES if getattr(cluster, key) is None), None):
            near = f"cluster=h800, or cluster.{missing} in bytes or FLOP"
            raise RuleError.broken(f"cluster.{missing}", "must be known with deployment", "null", near)
        self._model = model
        self._cluster = cluster
        self._config = config
        self._is_fp8 = precision == "fp8"
        self._weights = _served_weights(model, _DTYPES[precision], fp8=self._is_fp8)
        self.token_bytes = _LATENT_BYTES * model.cached_values * (model.num_layers + model.mtp_depth)
        self._rates = {key: float(getattr(cluster, key)) for key in _RATES}
        self.room_bytes = config.memory_share * self._rates["memory_bytes"]

    def sets(self) -> list[GpuSet]:
        """Returns the smallest and the published sets for each role, without those that do not fit."""
        roles: tuple[Role, ...] = ("prefill", "decoding")
        sets = []
        for role in roles:
            published = (self._set(role, name, _PUBLISHED[role], size) for name, size in _PUBLISHED_ATTENTION.items())
            sets += [gpus for gpus in (self._smallest(role), *published) if gpus is not None]
        return sets

    def refused(self) -> tuple[int, str] | None:
        """Returns the largest number of GPUs that is too small for decoding, and why."""
        last = None
        for gpus in self._numbers():
            best = self._best("decoding", gpus)
            if best is not None and self._suffices(best):
                break
            least = min(self._weight_bytes(self._slots(gpus), attention) for attention in self._attentions(gpus))
            subject = "weights need"
            if least <= self.room_bytes:  # and the rest holds no sequence
                subject = "weights and one sequence need"
                least += self._config.context_tokens * self.token_bytes
            reason = f"{subject} {least / 1e9:.1f} GB of {self.room_bytes / 1e9:.1f}"
            last = gpus, reason if best is None else f"caches hold {best.cached_tokens:,} tokens"
        return last

    def _numbers(self) -> Iterator[int]:
        node = self._cluster.ranks_per_node
        return chain((n for n in range(1, node) if node % n == 0), range(node, _MOST_GPUS + 1, node))

    def _attentions(self, gpus: int) -> list[int]:
        most = min(gpus, self._cluster.ranks_per_node)
        return [n for n in range(1, most + 1) if gpus % n == 0 and self._model.num_heads % n == 0]

    def _slots(self, gpus: int, redundant: int = 0) -> int:
        return -(-(self._model.num_routed_experts + redundant) // gpus)

    def _weight_bytes(self, experts: int, attention: int) -> float:
        weights = self._weights
        return experts * weights.num_layers * weights.expert + weights.divided / attention + weights.replicated

    def _suffices(self, gpus: GpuSet) -> bool:
        """Returns whether the cache has room: of a prefill set, for two batches, one of which is handed over."""
        needed = self._config.cached_tokens if gpus.role == "decoding" else 2 * self._config.prefill_tokens * gpus.gpus
        return gpus.cached_tokens >= needed

    def _smallest(self, role: Role) -> GpuSet | None:
        sets = (self._best(role, gpus) for gpus in self._numbers())
        return next((gpus for gpus in sets if gpus is not None and self._suffices(gpus)), None)

    def _best(self, role: Role, gpus: int) -> GpuSet | None:
        """Returns the set with the group size that leaves room for most tokens."""
        sets = (self._set(role, _SMALLEST, gpus, attention) for attention in self._attentions(gpus))
        return max(filter(None, sets), key=attrgetter("cached_tokens"), default=None)

    def _set(self, role: Role, name: str, gpus: int, attention: int) -> GpuSet | None:
        """Returns a set with the bound of its speed, or None if a group has no room for a sequence."""
        is_published = name in _PUBLISHED_ATTENTION
        experts = self._slots(gpus, _PUBLISHED_REDUNDANT[role] if is_published else 0)
        routed_shared = self._model.num_shared_experts if is_published and role == "decoding" else 0
        weight_bytes = self._weight_bytes(experts, attention)
        weight_bytes -= self._weights.shared / attention if routed_shared else 0
        group_tokens = int((self.room_bytes - weight_bytes) // self.token_bytes)
        if group_tokens < self._config.context_tokens or self._model.num_heads % attention:
            return None
        groups = gpus // attention
        sequences = group_tokens // self._config.context_tokens
        tokens = self._config.prefill_tokens if role == "prefill" else sequences / attention
        times = self._pass_seconds(role, gpus, attention, tokens, experts, routed_shared)
        limit = max(times, key=times.__getitem__)
        return GpuSet(
            role=role,
            name=name,
            gpus=gpus,
            attention=attention,
            experts=experts,
            copies=experts * gpus - self._model.num_routed_experts,
            weight_bytes=weight_bytes,
            cached_tokens=group_tokens * groups,
            tokens_per_second=tokens * gpus / times[limit],
            pass_seconds=times[limit],
            limit=limit,
        )

    def _pass_seconds(
        self, role: Role, gpus: int, attention: int, tokens: float, slots: int, routed_shared: int
    ) -> dict[str, float]:
        """Returns the least times of a pass with this many tokens of each GPU, by what takes them.

        Args:
            slots: experts of a GPU, with copies.
            routed_shared: shared experts that are routed, and so are no part of what a group divides.
        """
        model = self._model
        rates = self._rates
        weights = self._weights
        context = self._config.context_tokens
        # Memory: experts that at least one token chose, other weights but the embedding, and the cache of a group.
        chosen = 1 - (1 - model.num_experts_per_token / model.num_routed_experts) ** (tokens * gpus)
        experts = slots * weights.num_layers * weights.expert * chosen
        divided = weights.divided - weights.embedding - (weights.shared if routed_shared else 0)
        others = divided / attention + weights.replicated
        cache = tokens * attention * self.token_bytes * (context if role == "decoding" else 1)
        # Computation: attention reads latents when it decodes, and keys and values of half the prompt in prefill.
        linear = 2 * count_parameters(model).active_without_embedding
        scores = training_flops_per_token(model, context) / 3 - linear
        if role == "decoding":
            scores = 2 * model.num_layers * model.num_heads * model.cached_score_dim * context
        flops = linear / (2 if self._is_fp8 else 1) + scores
        across, within = self._sent_bytes(gpus, attention, routed_shared)
        return {
            "memory": (experts + others + cache) / rates["memory_bytes_per_second"],
            "links": tokens
            * max(across / rates["inter_node_bytes_per_second"], within / rates["intra_node_bytes_per_second"]),
            "compute": tokens * flops / rates["peak_flops"],
        }

    def _sent_bytes(self, gpus: int, attention: int, routed_shared: int) -> tuple[float, float]:
        """Returns the bytes that a GPU sends for each of its tokens to other nodes, and within its node.

        A token goes once to each node of its experts if nodes have whole groups of experts, else once to each expert.
        """
        model = self._model
        node = min(gpus, self._cluster.ranks_per_node)
        nodes = -(-gpus // node)
        choices = model.num_experts_per_token + routed_shared
        visits = min(model.num_limited_groups, nodes) if model.num_expert_groups % nodes == 0 else choices
        dispatched = 1 + 4 / 128 if self._is_fp8 else _ROW_BYTES  # FP8 codes with a scale for 128 of them
        row = model.hidden_size * (dispatched + _ROW_BYTES) * (model.num_layers - model.num_dense_layers)
        # Sums of attention's partial outputs in a group: twice all but a part of each row, for every member's tokens.
        sums = 2 * (attention - 1) * model.hidden_size * _ROW_BYTES * model.num_layers
        return row * visits * (nodes - 1) / nodes, row * choices * (node - 1) / node + sums


@cache
def _served_weights(model: ModelConfig, dtype: StoredDtype, *, fp8: bool) -> ServedWeights:
    """Counts the bytes of an export's tensors, without those that MTP modules copy from the main model."""
    sizes = {"expert": 0, "embedding": 0, "divided": 0, "shared": 0, "replicated": 0}
    for name, stored in stored_tensors(model, dtype=dtype, fp8=fp8).items():
        if copied_from(name) is not None:
            continue
        kind = "expert" if ".mlp.experts." in name else "replicated" if _REPLICATED.search(name) else "divided"
        size = stored.num_elements * ITEM_BYTES[stored.dtype]
        sizes[kind] += size
        sizes["shared"] += size if ".mlp.shared_experts." in name else 0
        sizes["embedding"] += size if name == "model.embed_tokens.weight" else 0
    layers = model.num_layers - model.num_dense_layers + model.mtp_depth
    expert = sizes.pop("expert") / max(1, layers * model.num_routed_experts)
    return ServedWeights(expert=expert, num_layers=layers, **sizes)


def deployment_values(
    model: ModelConfig, cluster: ClusterConfig, precision: str, config: DeploymentConfig
) -> dict[str, Any]:
    """Returns the sets of GPUs for a deployment, and the largest number that is too small."""
    deployment = Deployment(model, cluster, precision, config)
    refused = deployment.refused()
    return {
        "precision": precision,
        "token_bytes": deployment.token_bytes,
        "used_bytes": deployment.room_bytes,
        **asdict(config),
        "sets": [asdict(gpus) for gpus in deployment.sets()],
        "too_few": None if refused is None else {"gpus": refused[0], "reason": refused[1]},
    }


_COLUMNS = ("role", "set", "GPUs", "group", "experts", "weights", "tokens held", "tokens/s", "a GPU", "pass", "limit")


def deployment_text(values: Mapping[str, Any]) -> str:
    """Returns the table of a deployment as lines of at most 105 columns."""
    cache = f"{bytes_text(values['token_bytes'])} of cache a token"
    lines = [f"weights in {values['precision']}, {cache}, {bytes_text(values['used_bytes'])} of each GPU are used"]
    wanted = f"{values['cached_tokens']:,} tokens in the caches of decoding"
    if refused := values["too_few"]:
        lines.append(f"{refused['gpus']:,} GPUs are too few for {wanted}: {refused['reason']}")
    rows: list[Sequence[str]] = [_COLUMNS]
    for gpus in values["sets"]:
        speed = gpus["tokens_per_second"]
        more = gpus["copies"] // gpus["gpus"]
        experts = f"{gpus['experts'] - more} + {more}" if more else str(gpus["experts"])
        sizes = (gpus["role"], gpus["name"], f"{gpus['gpus']:,}", str(gpus["attention"]), experts)
        memory = (bytes_text(gpus["weight_bytes"]), f"{gpus['cached_tokens']:,}")
        times = (f"{speed:,.0f}", f"{speed / gpus['gpus']:,.0f}", f"{gpus['pass_seconds'] * 1e3:.0f} ms")
        rows.append((*sizes, *memory, *times, gpus["limit"]))
    lines += ["", *aligned(rows, text=[0, 1, 10])]
    for gpus in values["sets"]:
        if gpus["copies"] % gpus["gpus"]:
            kinds = "redundant or shared" if gpus["name"] in _PUBLISHED_ATTENTION else "redundant"
            slots = f"{gpus['experts'] * gpus['gpus']:,} experts of a layer on {gpus['gpus']:,} GPUs"
            lines.append(f"{gpus['role']} {gpus['name']}: {slots}, {gpus['copies']:,} of them {kinds}")
    if not any(gpus["name"] == _SMALLEST and gpus["role"] == "decoding" for gpus in values["sets"]):
        lines.append(f"no set of up to {_MOST_GPUS:,} GPUs holds them")
    return "\n".join(lines)

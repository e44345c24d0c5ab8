"""Opens and checks weights that are read from a checkpoint or a Hugging Face folder.

Torch is imported only to read tensors.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from base.ranges import PositiveInt
from base.refusal import ConfigError, divisors
from comm.config import Cut
from data.chat.templates import CHAT_TEMPLATES
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.hf.checkpoint import ITEM_BYTES, open_checkpoint
from model.hf.config import CONFIG_NAME, unknown_keys
from model.hf.files import read_json
from model.hf.names import StoredDtype, copied_from, is_rotary, layer_of, weights
from score.scorers import JudgeConfig, RewardModelScorerConfig, read_constitution
from train.checkpoint.index import PREFIXES, ROTARY_PREFIX, WeightsKind, read_index
from train.checkpoint.locate import CHECKPOINTS_NAME, differences, locate
from train.checkpoint.manifest import MANIFEST_NAME, TOKENIZER_NAME, CheckpointError, read_model
from train.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.hf.reader import HfReader
    from train.checkpoint.parts import PartReader
    from train.core.learner import Learner

WeightsForm = Literal["hf", "checkpoint"]
LARGEST_FILE_BYTES = 5_000_000_000
# The range of positions changes no weight's shape, and a later phase of training may extend it.
_FREE_KEYS = ("max_position_tokens", "rope_scaling")
REWARD_MODEL_KEY = "reward.parts, kind reward_model: ckpt"
LIKE_POLICY = "a reward model of the policy's sizes"
"""A path without weights, with which a run can be planned and not started."""
JUDGE_KEY = "reward.parts, kind judge: weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """Configuration of a conversion; see `conf/convert.yaml`. `source` is the key `from`."""

    source: WeightsForm
    path: str
    to: str
    format: WeightsForm | None
    dtype: Literal["bf16", "float32", "fp8"] | None
    max_shard_bytes: PositiveInt | None
    weights: WeightsKind
    mtp: Literal["keep", "drop"]
    accept_template: bool
    chat_template: Annotated[str, CHAT_TEMPLATES] | None
    processes: PositiveInt | None

    @property
    def target(self) -> WeightsForm:
        """The format that is written."""
        return self.format or ("checkpoint" if self.source == "hf" else "hf")

    @property
    def folder(self) -> Path:
        """The folder that is written."""
        return Path(self.to).expanduser()

    @property
    def file_bytes(self) -> int:
        """Largest size of a file."""
        return self.max_shard_bytes or LARGEST_FILE_BYTES

    @property
    def drop_mtp(self) -> bool:
        """Whether MTP modules are left out."""
        return self.mtp == "drop"


def is_hf_folder(path: str) -> bool:
    """Returns whether a path is a Hugging Face folder rather than one of this project."""
    folder = Path(path).expanduser()
    ours = (folder / MANIFEST_NAME).exists() or (folder / CHECKPOINTS_NAME).exists()
    return (folder / CONFIG_NAME).exists() and not ours


def source_folder(path: str, key: str) -> Path:
    """Returns the folder of the weights that a path names. It takes the arguments of `source_config`."""
    if is_hf_folder(path):
        return Path(path).expanduser()
    try:
        return locate(path, key).folder
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor is it a Hugging Face folder, which holds {CONFIG_NAME}") from error


def source_config(path: str, key: str, *, drop_mtp: bool = False) -> ModelConfig:
    """Reads the architecture of the weights that a path names. It imports no torch.

    `drop_mtp` leaves MTP modules out; those of a Hugging Face folder are then not checked.

    Raises:
        CheckpointError, HfError: there are no weights, or their architecture cannot be read.
    """
    folder = source_folder(path, key)
    if is_hf_folder(path):
        return open_checkpoint(folder, drop_mtp=drop_mtp).config
    config = read_model(folder, key)
    return replace(config, mtp_depth=0) if drop_mtp else config


def check_source(path: str, key: str, *, drop_mtp: bool = False) -> ModelConfig:
    """Makes all checks of `open_source` without torch, and returns the architecture."""
    config = source_config(path, key, drop_mtp=drop_mtp)
    if not is_hf_folder(path):
        open_source(path, key)
    return config


def open_source(path: str, key: str, *, drop_mtp: bool = False) -> "HfReader | CheckpointReader":
    """Opens the weights that a path names, and checks everything except their values."""
    folder = source_folder(path, key)
    if is_hf_folder(path):
        from model.hf.reader import HfReader

        return HfReader(folder, drop_mtp=drop_mtp)

    return CheckpointReader(folder, key)


def is_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Returns whether a folder has no tokenizer, or the same one."""
    there = folder / TOKENIZER_NAME
    return not there.is_file() or sha256(there.read_bytes()).hexdigest() == tokenizer.fingerprint


def unknown_notes(path: str) -> str:
    """Returns a note with the unknown keys of a Hugging Face folder's `config.json`, or an empty text."""
    if not is_hf_folder(path):
        return ""
    folder = Path(path).expanduser()
    unknown = unknown_keys(read_json(folder / CONFIG_NAME))
    return f"unknown keys of {CONFIG_NAME} are preserved: {', '.join(unknown)}" if unknown else ""


def held_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's weights and router biases by name, without copies."""
    return dict(iterate_held(config))


def iterate_held(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields `held_weights` one by one, for sizes that a file claims."""
    return ((name, shape) for name, shape in weights(config) if copied_from(name) is None and 0 not in shape)


class CheckpointReader:
    """A checkpoint after its manifest, index and files of weights were checked. Reads tensors on demand.

    Raises:
        CheckpointError: there is no average, or the files are not what a checkpoint has.
    """

    def __init__(self, folder: Path, key: str, kind: WeightsKind = "trained") -> None:
        self.config: ModelConfig = read_model(folder, key)
        self._place = f"{key}: {folder}"
        self._folder = folder
        self._prefix = PREFIXES[kind]
        try:
            self._index = read_index(folder, self.config)
        except CheckpointError as error:
            raise self._error(str(error)) from error
        if kind == "ema" and not any(name.startswith(self._prefix) for name in self._index):
            raise self._error("weights: must be trained, because the run kept no average (ema.decay), is ema")
        self._parts: PartReader | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in iterate_held(self.config):
            entry = self._index.get(self._prefix + name)
            if entry is None:
                raise self._error(f"{name}: must be there, is missing")
            if entry.stored.shape != shape:
                raise self._error(f"{name}: must have shape {shape}, has {entry.stored.shape}")
            self._shapes[name] = shape
        self._check_files()

    @property
    def dtypes(self) -> dict[str, StoredDtype]:
        """Types in which the weights are stored, by name."""
        return {name: self._index[self._prefix + name].stored.dtype for name in self._shapes}

    def fill(self, named: "Mapping[str, Tensor]") -> None:
        """Fills the given contiguous tensors by name, converted to their types."""
        self._fill(self._prefix, named)

    def tensor(self, name: str, dtype: "torch.dtype") -> "Tensor":
        """Reads one tensor, converted to a type, and raises the same errors as `fill`."""
        import torch

        tensor = torch.empty(self._shapes[name], dtype=dtype)
        self.fill({name: tensor})
        return tensor

    def rotary(self) -> "dict[str, Tensor]":
        """Reads the stored frequencies of the rotary embedding of existing layers, by released name."""
        import torch

        from model.hf.reader import TORCH_DTYPES

        num_layers = self.config.num_layers + self.config.mtp_depth
        named: dict[str, Tensor] = {}
        shape = (self.config.rotated_dim // 2,)
        for name, entry in self._index.items():
            released = name.removeprefix(ROTARY_PREFIX)
            if released == name or (layer_of(released) or 0) >= num_layers:
                continue
            if not is_rotary(released) or entry.stored.shape != shape:
                raise self._error(f"{released}: must be stored frequencies of shape {shape}, is {entry.stored}")
            named[released] = torch.empty(shape, dtype=TORCH_DTYPES[entry.stored.dtype])
        self._fill(ROTARY_PREFIX, named)
        return named

    def _fill(self, prefix: str, named: "Mapping[str, Tensor]") -> None:
        from model.hf.reader import all_finite
        from train.checkpoint.parts import PartReader

        if self._parts is None:
            self._parts = PartReader(self._folder, self._index)
        try:
            self._parts.fill({prefix + name: tensor for name, tensor in named.items()})
        except CheckpointError as error:
            raise self._error(str(error)) from error
        for name, tensor in named.items():
            if not all_finite(tensor):
                raise self._error(f"{name}: must hold finite numbers, does not")

    def _check_files(self) -> None:
        """Refuses files of weights that are missing or truncated. Files next to them may have been replaced."""
        needed = Counter[str]()
        for name in self._shapes:
            entry = self._index[self._prefix + name]
            for part in entry.parts:
                needed[part.file] += part.count * ITEM_BYTES[entry.stored.dtype]
        for file, num_bytes in needed.items():
            path = self._folder / file
            if not path.is_file():
                raise self._error(f"{file}: must be there, is missing")
            if path.stat().st_size < num_bytes:
                raise self._error(f"{file}: must have at least {num_bytes} bytes, has {path.stat().st_size}")

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._place}: {problem}")


def second_network_run(config: TrainConfig, path: str, key: str) -> TrainConfig:
    """Returns the run with the architecture of a second network, without MTP modules."""
    like_policy = replace(config.model, head="score", mtp_depth=0)
    model = like_policy if path == LIKE_POLICY else source_config(path, key, drop_mtp=True)
    # The cut of the run's own layers does not fit other layers.
    return replace(config, model=model, parallelism=replace(config.parallelism, cut=Cut("even")))


def check_second_network(config: TrainConfig, path: str, key: str, role: str) -> None:
    """Rejects a network with another vocabulary, and one that the run's layout cannot hold."""
    second = source_config(path, key, drop_mtp=True)
    if second.vocab_size != config.model.vocab_size:
        raise ConfigError(vocabulary_problem(config, second, path, key, role))
    stages = config.parallelism.pipeline * (config.schedule.chunks or 1)
    experts = config.parallelism.expert
    if second.num_layers < stages:
        raise ConfigError(
            f"{key}: must have at least {stages} layers, one for each stage of the pipeline, {path} has "
            f"{second.num_layers}; nearest valid: parallelism.pipeline={second.num_layers}"
        )
    if second.num_routed_experts % experts:
        raise ConfigError(
            f"{key}: its experts must be divisible by parallelism.expert={experts}, {path} has "
            f"{second.num_routed_experts}; nearest valid: "
            f"parallelism.expert={divisors(second.num_routed_experts, experts)}"
        )


def vocabulary_problem(config: TrainConfig, second: ModelConfig, path: str, key: str, role: str) -> str:
    """Returns the message of an error about a vocabulary. Arguments as in `check_second_network`."""
    return (
        f"{key}: must have the vocabulary of the model, {config.model.vocab_size} tokens, {path} has "
        f"{second.vocab_size}; nearest valid: {role} with the same tokenizer"
    )


def check_reward_model(config: TrainConfig, part: RewardModelScorerConfig) -> None:
    """Rejects weights that are no reward model or do not fit the run."""
    reward_model = rating_model(part.ckpt)
    if part.place == "pipeline":
        check_second_network(config, part.ckpt, REWARD_MODEL_KEY, "a reward model")
    elif reward_model.vocab_size != config.model.vocab_size:
        raise ConfigError(vocabulary_problem(config, reward_model, part.ckpt, REWARD_MODEL_KEY, "a reward model"))


def check_judge(config: TrainConfig, part: JudgeConfig) -> None:
    """Rejects a constitution that cannot be read, and weights that cannot judge or do not fit the run."""
    read_constitution(part)
    if part.ckpt is None:
        return
    most = judge_model(part.ckpt).max_position_tokens
    check_second_network(config, part.ckpt, JUDGE_KEY, "a judge")
    part.check_room(most, f"the {most} positions of {part.ckpt}", ConfigError)


def judge_model(ckpt: str) -> ModelConfig:
    """Reads the architecture of a judge, or rejects weights that write no text."""
    model = source_config(ckpt, JUDGE_KEY, drop_mtp=True)
    if model.head != "tokens":
        raise ConfigError(
            f"{JUDGE_KEY}: must be policy, reference, or weights with a head for tokens, {ckpt} is a reward model; "
            f"nearest valid: kind reward_model"
        )
    return model


def rating_model(ckpt: str) -> ModelConfig:
    """Reads the architecture of a reward model, or rejects weights that give no scores."""
    model = source_config(ckpt, REWARD_MODEL_KEY, drop_mtp=True)
    if model.head != "score":
        raise ConfigError(
            f"{REWARD_MODEL_KEY}: must be a reward model, which has a head for scores, {ckpt} has a head for "
            f"{model.head}; nearest valid: a checkpoint of task=reward_model, or kind judge"
        )
    return model


def scoring_runs(config: TrainConfig) -> list[TrainConfig]:
    """Returns the run with the architecture of each reward model and judge in its pipeline."""
    runs = []
    for part in () if config.reward is None else config.reward.parts:
        match part:
            case RewardModelScorerConfig(place="pipeline"):
                runs.append(second_network_run(config, part.ckpt, REWARD_MODEL_KEY))
            case JudgeConfig(ckpt=str(ckpt)):
                runs.append(second_network_run(config, ckpt, JUDGE_KEY))
            case _:
                pass
    return runs


def check_same_tokenizer(path: str, key: str, tokenizer: Tokenizer, nearest_valid: str) -> None:
    """Raises `CheckpointError` if the weights of a reward model or judge have another tokenizer."""
    if not is_same_tokenizer(source_folder(path, key), tokenizer):
        raise CheckpointError(
            f"{key}: must have the tokenizer of this run's data, {path} has another one; nearest valid: {nearest_valid}"
        )


def check_model_parts(config: TrainConfig) -> None:
    """Rejects weights of a reward model, and a constitution of a judge, that cannot be used."""
    for part in () if config.reward is None else config.reward.parts:
        match part:
            case RewardModelScorerConfig():
                check_reward_model(config, part)
            case JudgeConfig():
                check_judge(config, part)
            case _:
                pass


def check_initial(config: TrainConfig) -> None:
    """Refuses weights from which the run cannot start. It reads only headers.

    Raises:
        CheckpointError, HfError: there are no weights, they cannot be read, have another architecture, or lack the
            model's MTP modules.
    """
    assert config.init_from is not None
    _compare_architectures(config, check_source(config.init_from, "init_from", drop_mtp=config.init_mtp == "drop"))


def load_initial(config: TrainConfig, learner: "Learner", tokenizer: Tokenizer) -> str:
    """Fills weights from `init_from` before the first step, and describes them. All ranks call it."""
    from model.hf.names import SCORE_HEAD, layer_of
    from model.transformer import named_tensors

    assert config.init_from is not None
    source = open_source(config.init_from, "init_from", drop_mtp=config.init_mtp == "drop")
    changed = _compare_architectures(config, source.config)
    named = named_tensors(learner.replica.model)
    if config.init_mtp == "fresh":
        last = config.model.num_layers
        named = {name: tensor for name, tensor in named.items() if (layer := layer_of(name)) is None or layer < last}
    if source.config.head != config.model.head:
        named.pop(SCORE_HEAD, None)  # starts from zero
    source.fill(named)
    learner.optimizer.follow_weights()
    fresh = config.init_mtp == "fresh" and config.model.mtp_depth > 0
    text_note = "token ids mean other text, because its tokenizer.json differs from the tokenizer of this run's data"
    notes = ["score head from zero"] if source.config.head != config.model.head else []
    notes += [*(["MTP from the seed"] if fresh else []), *changed]
    notes += [] if is_same_tokenizer(source_folder(config.init_from, "init_from"), tokenizer) else [text_note]
    unknown = unknown_notes(config.init_from)
    notes += [unknown] if unknown else []
    return f"weights from {config.init_from}" + (f" ({'; '.join(notes)})" if notes else "")


def _compare_architectures(config: TrainConfig, source: ModelConfig) -> list[str]:
    """Refuses differences in architecture; returns a line for each difference that is allowed."""
    # The number of scores by default and the same number as a value are one architecture.
    there = {**asdict(source), "group_score_experts": source.num_group_scores}
    here = {**asdict(config.model), "group_score_experts": config.model.num_group_scores}
    head_there = there.pop("head")
    head = here.pop("head")
    if head_there == "score" and head != "score":
        raise CheckpointError(
            f"init_from: {config.init_from} must have an output head for tokens, is a reward model, which has a head "
            f"for scores; nearest valid: task=reward_model"
        )
    depth_there = there.pop("mtp_depth")
    depth = here.pop("mtp_depth")
    for shape in (there, here):
        del shape["initializer_range"]  # no weights are drawn
    free = [line for key in _FREE_KEYS for line in differences(f"model.{key}", there.pop(key), here.pop(key))]
    fixed = differences("model", there, here)
    if fixed:
        raise CheckpointError(
            f"init_from: {config.init_from} holds another architecture: {'; '.join(fixed)}; "
            f"nearest valid: model=of_checkpoint, which uses the architecture of the weights"
        )
    if depth and config.init_mtp == "drop":
        raise CheckpointError(
            f"model.mtp_depth: must be 0 with init_mtp=drop, is {depth}; nearest valid: model.mtp_depth=0, or "
            f"init_mtp=fresh to start MTP modules from the seed"
        )
    if depth > depth_there and config.init_mtp == "checkpoint":
        raise CheckpointError(
            f"model.mtp_depth: must be at most {depth_there}, the MTP modules that init_from={config.init_from} "
            f"holds, is {depth}; nearest valid: model.mtp_depth={depth_there}, or init_mtp=fresh to start them from "
            f"the seed"
        )
    return free

"""Reads a run's configuration in four steps: compose, resolve, decode, check. Imports no torch.

Only `resolve`, before values are decoded, and the checks after it access files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from base.decode import decode, encode
from base.refusal import ConfigError, broken, nearest, nearest_key
from data.config import DataConfig, with_parts
from data.prepare import check_config, estimate_tokens
from data.registry import DATA_SOURCES
from data.tokenizer import TRAIN_128K, find_tokenizer_file, other_tokenizer
from evaluation.protocol import EVALUATION_TASKS, checked_file
from launch.config.compose import MissingValueError, compose, own_keys
from launch.config.memory import check_memory
from launch.config.rules import check_all, check_name, check_rules
from model.config import ATTENTION_FORMS, ladder
from score.reward import check_problems
from train.checkpoint.locate import AUTO, CHECKPOINTS_NAME, check_compatible, locate, newest_whole, verify_sizes
from train.checkpoint.manifest import TOKENIZER_NAME, read_manifest
from train.checkpoint.sources import check_initial, check_model_parts, source_config, source_folder
from train.config import RANDOM, TrainConfig, named_weights
from train.config.tasks import TASKS
from train.predict.fit import with_fitting_cap
from train.predict.timing import with_chunks
from train.start.corpus import MOST_REPEATS, check_repeats, prepare_corpus
from train.terminal import progress_on

_ENDLESS_STEPS = 2**40
_MOMENTS = Literal["auto", "float32", "bf16"]
_LEAST_TOKENIZER_SHARE = 0.9


def compose_run(overrides: Sequence[str], *, checks_weights: bool = True) -> TrainConfig:
    """Composes, resolves and decodes a run's configuration; `check` is the last step."""
    try:
        values = compose("train", overrides)
    except MissingValueError as missing:
        others = _other_problem(overrides, missing.keys, checks_weights=checks_weights)
        raise ConfigError(f"{missing}{others}") from missing
    return read_run(values, checks_weights=checks_weights)


def _other_problem(overrides: Sequence[str], missing: Sequence[str], *, checks_weights: bool) -> str:
    """Returns what else is wrong with a run that lacks values, as the end of a message; empty if nothing."""
    examples = {key: {"data.paths": [key], "data.tokenizer": None}.get(key, key) for key in missing}
    try:
        values = resolve(compose("train", overrides, examples))
        steps = values["task"].get("steps") or _ENDLESS_STEPS
        config = with_chunks(read_config(_with_steps(values, steps)))
        _check_values(config, checks_weights=checks_weights)
    except ConfigError as error:
        # A value within a list cannot be filled and is still missing.
        return "" if isinstance(error, MissingValueError) else f". Also {error}"
    return ""


def read_run(values: Mapping[str, Any], *, checks_weights: bool = True) -> TrainConfig:
    """Resolves and decodes a run's composed values. Every command that starts or plans a run calls it.

    Keys of `conf/submit.yaml`, which an experiment may also set, are ignored. If `task.epochs` is the length of the
    run, `task.steps` follows from the data, which are prepared after everything else has been checked.
    """
    submit_keys = own_keys("submit")
    resolved = resolve({key: value for key, value in values.items() if key not in submit_keys})
    task = resolved.get("task")
    has_epochs = isinstance(task, Mapping) and task.get("steps") is None and task.get("epochs") is not None
    config = read_config(_with_steps(resolved, _ENDLESS_STEPS) if has_epochs else resolved)
    config = with_fitting_cap(with_chunks(config))
    if not has_epochs:
        return config
    _check_values(config, checks_weights=checks_weights)
    endless = replace(config, accept=(*config.accept, "repeated_corpus"))
    check_files(endless)
    num_sequences = len(prepare_corpus(endless, progress_on()).train.tokens_NL)
    steps = config.batch_sizes.steps_for(float(resolved["task"]["epochs"]) * num_sequences)
    return replace(config, task=replace(config.task, steps=steps))


def _with_steps(values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {**values, "task": {**values["task"], "steps": steps}}


def read_config(values: Mapping[str, Any]) -> TrainConfig:
    """Decodes a run's configuration from resolved values, as in a run's `config.yaml`. Reads no files."""
    data = values.get("data")
    optim = values.get("optim")
    precision = values.get("precision")
    if isinstance(optim, Mapping) and "moments" in optim:
        # Decoded by itself, because an error must list `auto` as a choice, which the run's configuration is not.
        moments: str = decode(_MOMENTS, optim["moments"], "optim.moments")  # type: ignore[arg-type]
        is_fp8 = isinstance(precision, Mapping) and precision.get("kind") == "fp8"
        chosen = {"auto": "bf16" if is_fp8 else "float32"}.get(moments, moments)
        values = {**values, "optim": {**optim, "moments": chosen}}
    if isinstance(data, Mapping):
        # On the command line, the keys of the source are mixed with the other keys of `data`: `data.paths=[a,b]`.
        source_keys = {field.name for _, entry in DATA_SOURCES.items() for field in fields(entry.config)}
        hint = get_type_hints(DataConfig, include_extras=True)["source"]
        source = decode(hint, {key: data[key] for key in data if key in source_keys}, "data")
        others = {key: value for key, value in data.items() if key not in source_keys}
        values = {**values, "data": {**others, "source": source}}
    return decode(TrainConfig, values)


def write_config(config: TrainConfig) -> dict[str, Any]:
    """Returns a configuration as the plain values that `read_config` decodes."""
    values: dict[str, Any] = encode(config)
    data = values["data"]
    values["data"] = {**data.pop("source"), **data}
    return values


def check(config: TrainConfig, *, checks_weights: bool = True) -> None:
    """Rejects an invalid configuration before any process starts. A plan and a sample need no weights."""
    for key, (value, run_value) in config.planned_only.items():
        raise broken(key, "is planned by launch.plan and not run", value, run_value)
    _check_values(config, checks_weights=checks_weights)
    check_memory(config, check_rules)
    check_files(config)


def _check_values(config: TrainConfig, *, checks_weights: bool) -> None:
    check_all(config, check_name, check_rules, *([check_weights] if checks_weights else []))


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in the composed values of a run that depend on its weights or on the resumed run."""
    resolved = dict(values)
    plugins = values.get("plugins")
    model = values.get("model")
    data = values.get("data")
    weights = named_weights(values.get("init_from"))
    if isinstance(plugins, list | tuple) and all(isinstance(path, str) for path in plugins):
        # Absolute paths, because ranks and later runs may have another working directory.
        resolved["plugins"] = [str(Path(path).expanduser().resolve()) for path in plugins]
    if isinstance(model, Mapping):
        expanded = expand_model(model, weights, values.get("init_mtp"))
        resolved["model"] = _with_task(expanded, model.get("head"), values.get("task"))
    if isinstance(data, Mapping) and "tokenizer" in data:
        resolved["data"] = {**data, "tokenizer": expand_tokenizer(data["tokenizer"], weights, values)}
        shape = resolved.get("model")
        if data.get("tokenizer_vocab_size") is None and isinstance(shape, Mapping) and "vocab_size" in shape:
            resolved["data"]["tokenizer_vocab_size"] = shape["vocab_size"]
    return resolved


def expand_model(model: Mapping[str, Any], init_from: object, init_mtp: object = "checkpoint") -> dict[str, Any]:
    """Returns the keys of a `ModelConfig`, from those of `model` or from its `kind`.

    With `init_mtp=drop`, `of_checkpoint` has no MTP modules of the weights that `init_from` names.
    """
    if "kind" not in model:
        return dict(model)
    kind = model["kind"]
    kinds = {"ladder": ("kind", "size"), "of_checkpoint": ("kind",)}
    if kind not in kinds:
        raise ConfigError(
            f"model.kind: must be one of {', '.join(kinds)}, is {kind!r}; {nearest(str(kind), list(kinds))}"
        )
    changes = {key: value for key, value in model.items() if key not in kinds[kind]}
    known_keys = list(dict.fromkeys(field.name for _, form in ATTENTION_FORMS.items() for field in fields(form.config)))
    for key in changes:
        if key not in known_keys:
            choices = [f"model.{name}" for name in (*kinds[kind], *known_keys)]
            raise ConfigError(f"model.{key}: unknown key; {nearest_key(f'model.{key}', choices)}")
    if kind == "ladder":
        size = model.get("size")
        if type(size) is not int or size < 1:
            raise ConfigError(f"model.size: must be a whole number of at least 1, is {size!r}; nearest valid: 1")
        return {**asdict(ladder(size)), **changes}
    if not isinstance(init_from, str):
        raise ConfigError(
            "model: of_checkpoint reads the architecture from init_from, which names no weights; "
            "write init_from=FOLDER, or choose another model"
        )
    return {**asdict(source_config(init_from, "init_from", drop_mtp=init_mtp == "drop")), **changes}


def _with_task(model: dict[str, Any], given: object, task: object) -> dict[str, Any]:
    """Returns the keys of a model with those that the task sets.

    These are the rotary embedding of a longer context, the head if `given` is None, and no MTP modules with a score
    head.
    """
    kind = task.get("kind") if isinstance(task, Mapping) else None
    spec = TASKS.get(kind) if isinstance(kind, str) and kind in TASKS else None
    if spec is not None and isinstance(task, Mapping):
        model = {**model, **spec.model_keys(task)}
    head = "tokens" if spec is None else spec.head
    if head == "score":
        model = {**model, "mtp_depth": 0}
    return {**model, "head": head if given is None else given}


def expand_tokenizer(tokenizer: object, weights: str | None, values: Mapping[str, Any]) -> object:
    """Returns the file that `data.tokenizer` refers to, or None if a tokenizer must be trained.

    `auto` is the tokenizer of `data.folder`, or else of the resumed run, unless it was trained, or else that of the
    weights. A folder with a `tokenizer.json` is that of weights, a checkpoint or a run.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    path = Path(tokenizer).expanduser()
    rule = f"must be auto, null, a {TOKENIZER_NAME} or a folder that holds one"
    if tokenizer == "auto":
        data = values.get("data")
        folder = data.get("folder") if isinstance(data, Mapping) else None  # of a mixture that is prepared
        file = find_tokenizer_file(Path(folder).expanduser()) if isinstance(folder, str) else None
        file = file or _own_tokenizer(weights, values)
        return None if file is None else str(file)
    if tokenizer and path.is_dir():
        folder = locate(str(path), "data.tokenizer").folder if (path / CHECKPOINTS_NAME).is_dir() else path
        file = find_tokenizer_file(folder)
        if file is None:
            problem = other_tokenizer(folder) or "holds none"
            raise ConfigError(f"data.tokenizer: {str(folder)!r} must hold a {TOKENIZER_NAME}, {problem}")
        return str(file)
    if not tokenizer or not path.is_file():
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        hint = near if near.startswith("did you mean") else "nearest valid: auto, or null, which trains one"
        if tokenizer.startswith("train_"):
            hint = f"nearest valid: data.tokenizer={TRAIN_128K} of launch.prepare, or null, which trains one"
        raise ConfigError(f"data.tokenizer: {rule}, is {tokenizer!r}; {hint}")
    return tokenizer


def _own_tokenizer(weights: str | None, values: Mapping[str, Any]) -> Path | None:
    resume = values.get("resume")
    out_dir = values.get("out_dir")
    if resume == AUTO:
        has_folder = isinstance(out_dir, str) and bool(out_dir)
        newest = newest_whole(Path(str(out_dir)).expanduser(), check=verify_sizes) if has_folder else None
        resume = None if newest is None else str(newest)
    if isinstance(resume, str):
        folder = locate(resume, check=verify_sizes).folder
        data = read_manifest(folder).get("data")
        return folder / TOKENIZER_NAME if isinstance(data, dict) and data.get("tokenizer") == "given" else None
    if weights is None:
        return None
    folder = source_folder(weights, "init_from")
    file = find_tokenizer_file(folder)
    if file is None and (problem := other_tokenizer(folder)):
        raise ConfigError(f"data.tokenizer: auto uses the tokenizer of init_from={weights}, which {problem}")
    return file


def check_files(config: TrainConfig) -> None:
    """Rejects a run with missing or unfitting text, checkpoint or initial weights."""
    check_text(config, check_data(config))
    _check_evaluation(config)
    TASKS.get(config.task.kind).check_files(config)
    check_model_parts(config)
    problems = DATA_SOURCES.get(config.data.source.kind).problems
    if config.reward is not None and problems is not None:
        check_problems(config.reward, lambda: (record for _, record in with_parts(config.data, problems)))
    if _check_resume(config) or config.initial_weights is None:
        return
    if config.resume not in (None, AUTO):
        rule = f"must be null with resume={config.resume}, which has its own weights"
        raise broken("init_from", rule, repr(config.init_from), "init_from=null")
    check_initial(config)


def check_data(config: TrainConfig) -> int:
    """Rejects unreadable data and too large tokenizers; returns the size of the tokenizer's vocabulary."""
    tokens = check_config(config.data)
    model = config.model.vocab_size
    if tokens <= model:
        return tokens
    kind = config.data.source.kind
    if config.data.tokenizer is None and DATA_SOURCES.get(kind).tokenizer is not None:
        raise broken("model.vocab_size", f"must be at least the {tokens} tokens of data.kind={kind}", model, tokens)
    if config.data.tokenizer is None:
        raise broken("data.tokenizer_vocab_size", f"must be at most model.vocab_size={model}", tokens, model)
    is_prepared = getattr(config.data.source, "folder", None) is not None
    other = "" if is_prepared else ", or data.tokenizer=null, which trains one"
    raise ConfigError(
        f"data.tokenizer: must have at most model.vocab_size={model} tokens, {config.data.tokenizer} has {tokens}; "
        f"nearest valid: model.vocab_size={tokens}{other}"
    )


def check_text(config: TrainConfig, num_tokens: int) -> None:
    """Rejects a tokenizer or a corpus that is far too small for the run, unless `accept` confirms it.

    The size of a tokenizer that belongs to the weights or to the source is what it must be.
    """
    data = config.data
    rows = config.model.vocab_size
    is_own = DATA_SOURCES.get(data.source.kind).tokenizer is not None or _is_tokenizer_of_weights(config)
    if num_tokens < _LEAST_TOKENIZER_SHARE * rows and not is_own and "small_tokenizer" not in config.accept:
        is_trained = data.tokenizer is None
        key = "data.tokenizer_vocab_size" if is_trained else "data.tokenizer"
        raise ConfigError(
            f"{key}: must have tokens for at least 90 % of model.vocab_size={rows}, as other rows learn nothing, has "
            f"{num_tokens}; nearest valid: {f'{key}={rows}' if is_trained else f'{key}=PATH of another'}, "
            f"model.vocab_size={num_tokens}, or accept=[small_tokenizer]"
        )
    needed = config.batch_sizes.tokens_before(config.task.steps) / MOST_REPEATS
    estimate = estimate_tokens(data, needed)
    if estimate is not None:
        check_repeats(config, estimate / config.batch.sequence_length_tokens)


def _is_tokenizer_of_weights(config: TrainConfig) -> bool:
    resumed = config.out_dir if config.resume == AUTO else config.resume
    folders = [Path(folder).expanduser().resolve() for folder in (config.init_from, resumed) if folder]
    tokenizer = config.data.tokenizer
    return tokenizer is not None and any(Path(tokenizer).resolve().is_relative_to(folder) for folder in folders)


def _check_resume(config: TrainConfig) -> bool:
    """Checks `resume`. Returns whether the run resumes from a checkpoint in its own folder."""
    if config.resume == AUTO:
        if not config.out_dir:
            raise ConfigError(
                "resume: auto searches out_dir for checkpoints, but out_dir is empty; nearest valid: out_dir=outputs/"
                f"{config.name}, or resume=null"
            )
        folder = newest_whole(Path(config.out_dir).expanduser(), check=verify_sizes)
        if folder is not None:
            # A run that was interrupted after its last step has no steps left, which is valid.
            check_compatible(folder, config, may_be_done=True)
        return folder is not None
    if config.resume is not None:
        # Only file sizes are checked here. All ranks together verify the contents later.
        check_compatible(locate(config.resume, check=verify_sizes).folder, config)
    return False


def check_weights(config: TrainConfig) -> None:
    """Rejects random weights for a task that needs trained ones, unless `init_from=random` confirms them."""
    kind = config.task.kind
    out_dir = config.out_dir
    if config.init_from is not None or not TASKS.get(kind).needs_weights or config.resume not in (None, AUTO):
        return
    if config.resume == AUTO and out_dir and newest_whole(Path(out_dir).expanduser(), check=verify_sizes) is not None:
        return
    random = f"init_from={RANDOM}, which confirms a start from random weights"
    near = f"init_from=FOLDER of a run or of Hugging Face weights, or {random}"
    raise broken("init_from", f"must name trained weights with task={kind}", "null", near)


def _check_evaluation(config: TrainConfig) -> None:
    tasks = config.evaluation.tasks
    for name in tasks.tasks:
        spec = EVALUATION_TASKS.get(name)
        if config.model.head not in spec.heads:
            raise ConfigError(
                f"evaluation.tasks: {name} needs a model with model.head={' or '.join(spec.heads)}, task.kind="
                f"{config.task.kind} has {config.model.head}; nearest valid: evaluation.tasks=[]"
            )
        settings = tasks.settings[name]
        for key in spec.required:
            if not getattr(settings, key):
                raise ConfigError(
                    f"evaluation.{name}.{key}: a value is needed if evaluation.tasks has {name}, is "
                    f"{getattr(settings, key)}; write evaluation.{name}.{key}=FILE"
                )
        for path in spec.files(settings):
            checked_file(f"evaluation.{name}", path)

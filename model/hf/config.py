"""Converts a checkpoint's `config.json` to an architecture and back. Imports no torch.

Both spellings of rotary embedding are read: the released one and that of transformers 5 (`rope_parameters`). The
released one is written, because transformers reads it too. YaRN follows transformers. With L = ln(factor), cos and sin
are scaled by `attention_factor`. Its default is (0.1 mscale L + 1) / (0.1 mscale_all_dim L + 1) if both are given and
not 0, else 0.1 L + 1. Scores are scaled by (0.1 mscale_all_dim L + 1)^2 if `mscale_all_dim` is given.

*Read* keys describe the architecture. *Harmless* keys do not affect what the network computes and are copied. An
unknown key whose name contains a word of `_WORDS`, such as `sliding_window`, may change the network and is rejected
unless its value is neutral. Any other unknown key is copied, and commands report it.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, assert_never

from model.config import (
    GqaConfig,
    HeadKind,
    MlaConfig,
    ModelConfig,
    PlainRope,
    RopeScaling,
    YarnRope,
    with_released_routing,
    yarn_temperature,
)
from model.hf.files import ConfigValues, HfError, format_value, read_json
from model.hf.names import BLOCK, StoredDtype

CONFIG_NAME = "config.json"
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Kimi K2 and GLM-4.7-Flash have the architecture of DeepSeek-V3 under other names.
_GLM_FLASH = "glm4_moe_lite"
_FORMS = {"deepseek_v3": "mla", "kimi_k2": "mla", _GLM_FLASH: "mla", "qwen3_moe": "gqa"}
MODEL_TYPES = tuple(_FORMS)
DTYPE_NAMES: dict[StoredDtype, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DEEPSEEK = "DeepseekV3"
_CLASSES = {_GLM_FLASH: "Glm4MoeLite", "qwen3_moe": "Qwen3Moe"}
_HEADS: dict[HeadKind, str] = {"tokens": "ForCausalLM", "score": "ForSequenceClassification"}
_ONLY: Mapping[str, Any] = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
}
_ONLY_OF: Mapping[str, Mapping[str, Any]] = {
    "mla": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True},
    "gqa": {"decoder_sparse_step": 1, "use_sliding_window": False},
}
_EXPORTED: Mapping[str, Mapping[str, Any]] = {
    "mla": {"router": "sigmoid"},
    "gqa": {
        "router": "softmax",
        "qk_norm": True,
        "num_shared_experts": 0,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "routed_scaling_factor": 1.0,
        "mtp_depth": 0,
        "mtp_hidden": "post_norm",
    },
}
"""Choices for which files of a form of attention have no key: their values in every model that the files describe."""
_SIZES = (
    ("vocab_size", "vocab_size", 1),
    ("hidden_size", "hidden_size", 1),
    ("num_layers", "num_hidden_layers", 1),
    ("dense_intermediate_size", "intermediate_size", 1),
    ("num_heads", "num_attention_heads", 1),
    ("num_experts_per_token", "num_experts_per_tok", 1),
    ("expert_intermediate_size", "moe_intermediate_size", 1),
    ("max_position_tokens", "max_position_embeddings", 1),
)
"""Sizes in every form: the model's key, the file's, and the least value."""
_SIZES_OF = {
    "mla": (
        ("kv_lora_rank", "kv_lora_rank", 1),
        ("qk_nope_head_dim", "qk_nope_head_dim", 1),
        ("qk_rope_head_dim", "qk_rope_head_dim", 2),
        ("v_head_dim", "v_head_dim", 1),
        ("num_routed_experts", "n_routed_experts", 1),
        ("num_shared_experts", "n_shared_experts", 0),
        ("num_expert_groups", "n_group", 1),
        ("num_limited_groups", "topk_group", 1),
    ),
    "gqa": (
        ("num_kv_heads", "num_key_value_heads", 1),
        ("head_dim", "head_dim", 2),
        ("num_routed_experts", "num_experts", 1),
    ),
}
_PRECISION = 1e-9
_MOST_OF_YARN = 1e9


def read_config(folder: Path) -> ModelConfig:
    """Returns the architecture that a checkpoint's `config.json` describes.

    MTP modules read the state after the final norm unless the file's `mtp_hidden`, a key of this project, says
    otherwise.

    Raises:
        HfError: the file is missing or not a JSON object; or a key is missing, has another type, is out of range, or
            requires an unsupported feature.
    """
    path = folder / CONFIG_NAME
    return parse_config(read_json(path), path)


def parse_config(keys: Mapping[str, Any], path: Path) -> ModelConfig:
    """Returns the architecture that the file's keys describe, as `read_config` does."""
    values = ConfigValues(path, keys)
    if values.need("model_type") not in MODEL_TYPES:
        raise values.error("model_type", f"must be one of {', '.join(MODEL_TYPES)}, is {values.get('model_type')!r}")
    form = _FORMS[values.get("model_type")]
    if form == "gqa":
        values = ConfigValues(path, _with_sizes(values, keys))
    for key, allowed in {**_ONLY, **_ONLY_OF[form]}.items():
        values.only(key, allowed)
    if values.get("attention_dropout"):
        raise values.error("attention_dropout", f"must be 0, is {values.get('attention_dropout')!r}")
    config = _READERS[form](values)
    check_unknown_keys(values, keys)
    _check_token_ids(values)
    return config


def write_config(
    config: ModelConfig, *, dtype: StoredDtype, fp8: bool, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the content of `config.json`, with keys of another checkpoint (`carried_keys`).

    Raises the errors of `check_format`.
    """
    check_format(config)
    carried = carried or {}
    model_type = str(carried.get("model_type"))
    # transformers has no class for scores under GLM's name.
    if _FORMS.get(model_type) != config.attention or (model_type == _GLM_FLASH and config.head != "tokens"):
        model_type = next(name for name, form in _FORMS.items() if form == config.attention)
    keys: dict[str, Any] = {
        "use_cache": True,
        **{key: value for key, value in carried.items() if key not in READ_KEYS},
        "architectures": [_CLASSES.get(model_type, _DEEPSEEK) + _HEADS[config.head]],
        "model_type": model_type,
        "torch_dtype": DTYPE_NAMES[dtype],
        **{theirs: getattr(config, ours) for ours, theirs, _ in (*_SIZES, *_SIZES_OF[config.attention])},
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        **write_rope(config.rope_theta, config.rope_scaling),
        **_ONLY,
        **_ONLY_OF[config.attention],
        "attention_dropout": 0.0,
    }
    if isinstance(config, MlaConfig):
        keys |= {
            "first_k_dense_replace": config.num_dense_layers,
            "num_key_value_heads": config.num_heads,
            "q_lora_rank": config.q_lora_rank,
            "routed_scaling_factor": config.routed_scaling_factor,
            "num_nextn_predict_layers": config.mtp_depth,
        }
        if model_type == _GLM_FLASH:
            keys["mlp_layer_types"] = _layer_types(config.num_layers, config.num_dense_layers)
    else:
        keys["mlp_only_layers"] = list(range(config.num_dense_layers))
    if config.head == "score":
        keys["num_labels"] = 1
        # transformers reads the score of the last token that is not padding. If the answer ends with that token, it
        # would read the one before. Without the key it reads the last token, one sequence at a time.
        if keys.get("pad_token_id") == keys.get("eos_token_id"):
            keys.pop("pad_token_id", None)
    if config.mtp_hidden != "post_norm":
        keys["mtp_hidden"] = config.mtp_hidden
    if not config.is_released_routing:
        keys["group_score_experts"] = config.num_group_scores
    if fp8:
        usual = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
        keys["quantization_config"] = carried.get("quantization_config", usual)
    return keys


def check_format(config: ModelConfig) -> None:
    """Raises an `HfError` if the model has a choice that `config.json` cannot state."""
    choices = _EXPORTED.get(config.attention)
    if choices is None:
        raise _no_key("attention", "mla or gqa", config.attention)
    for key, value in choices.items():
        if getattr(config, key) != value:
            raise _no_key(key, value, getattr(config, key), f" with attention {config.attention}")
    scaling = config.rope_scaling
    if isinstance(config, GqaConfig) and isinstance(scaling, YarnRope) and scaling.mscale_all_dim:
        raise _no_key("rope_scaling.mscale_all_dim", 0, scaling.mscale_all_dim, f" with attention {config.attention}")


def _no_key(key: str, valid: object, value: object, condition: str = "") -> HfError:
    rule = f"must be {valid} in Hugging Face's form{condition}, as config.json has no key for another"
    return HfError(f"model.{key}", "", f"{rule}, is {value}; nearest valid: the checkpoint itself")


def as_exported(config: ModelConfig) -> ModelConfig:
    """Returns the model with choices that files describe; of other forms, with the least latents."""
    if config.attention in _EXPORTED:
        return replace(config, **_EXPORTED[config.attention])
    keys = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    least = {"q_lora_rank": None, "kv_lora_rank": 1, "qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1}
    return MlaConfig(**{**keys, **least, **_EXPORTED["mla"], "attention": "mla"})


def _shared(values: ConfigValues, form: str) -> dict[str, Any]:
    """Returns the model's keys that files of all forms state, and the sizes of one form."""
    theta, scaling = read_rope(values, values.whole_number("max_position_embeddings", 1))
    return {
        **{ours: values.whole_number(theirs, least) for ours, theirs, least in (*_SIZES, *_SIZES_OF[form])},
        "norm_eps": values.number("rms_norm_eps"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "head": _head(values),
        "initializer_range": 0.02 if values.get("initializer_range") is None else values.number("initializer_range"),
        "attention": form,
    }


def _read_mla(values: ConfigValues) -> MlaConfig:
    config = MlaConfig(
        **_shared(values, "mla"),
        num_dense_layers=_num_dense_layers(values, values.whole_number("num_hidden_layers", 1)),
        q_lora_rank=None if values.need("q_lora_rank") is None else values.whole_number("q_lora_rank", 1),
        routed_scaling_factor=values.number("routed_scaling_factor"),
        mtp_depth=_mtp_depth(values),
        mtp_hidden=_mtp_hidden(values),
    )
    _check_groups(values, config)
    if values.get("group_score_experts") is None:
        return with_released_routing(config)
    number = values.whole_number("group_score_experts", 1)
    return config if number == config.num_group_scores else replace(config, group_score_experts=number)


def _with_sizes(values: ConfigValues, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keys of a Qwen3-MoE with sizes that transformers derives or names otherwise."""
    sizes = dict(keys)
    if keys.get("head_dim") is None:
        heads = values.whole_number("num_attention_heads", 1)
        sizes["head_dim"] = max(1, values.whole_number("hidden_size", 1) // heads)
    if keys.get("num_experts") is None and "num_local_experts" in keys:
        sizes["num_experts"] = keys["num_local_experts"]
    return sizes


def _read_gqa(values: ConfigValues) -> GqaConfig:
    values.need("norm_topk_prob")  # false in transformers if it is missing
    config = GqaConfig(
        **_shared(values, "gqa"),
        num_dense_layers=_num_first(values, values.whole_number("num_hidden_layers", 1)),
        **_EXPORTED["gqa"],
    )
    _check_equal(values, {"num_local_experts": config.num_routed_experts})
    _check_even(values, "head_dim", config.head_dim)
    _check_chosen(values, config.num_experts_per_token, config.num_routed_experts, "num_experts")
    if config.num_heads % config.num_kv_heads:
        raise values.error(
            "num_key_value_heads", f"must divide num_attention_heads {config.num_heads}, is {config.num_kv_heads}"
        )
    if isinstance(config.rope_scaling, YarnRope) and config.rope_scaling.mscale_all_dim:
        spelling = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        rule = "must be absent or 0, as this type scales cos and sin alone"
        raise values.error(f"{spelling}.mscale_all_dim", f"{rule}, is {config.rope_scaling.mscale_all_dim}")
    return config


def _num_first(values: ConfigValues, num_layers: int) -> int:
    """Returns the number of first layers without experts: all that the file lists as dense."""
    listed = values.get("mlp_only_layers") or []
    count = len(listed) if isinstance(listed, list) else 0
    if listed != list(range(count)) or count > num_layers:
        rule = f"must list the first layers in order, at most {num_layers}"
        raise values.error("mlp_only_layers", f"{rule}, is {format_value(listed)}; nearest: {list(range(count))}")
    return count


_READERS = {"mla": _read_mla, "gqa": _read_gqa}


def _num_dense_layers(values: ConfigValues, num_layers: int) -> int:
    """Returns the number of first layers without experts; transformers lists every layer of GLM-4.7-Flash."""
    kinds = values.get("mlp_layer_types")
    if kinds is None or values.get("first_k_dense_replace") is not None:
        # The default in transformers is 3, even for fewer layers: then all are dense.
        count = min(num_layers, values.whole_number("first_k_dense_replace", 0))
    else:
        count = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds is not None and kinds != _layer_types(num_layers, count):
        rule = f"must have dense for the first layers and sparse for all others, {num_layers} in all"
        raise values.error("mlp_layer_types", f"{rule}, is {format_value(kinds)}")
    return count


def _layer_types(num_layers: int, num_dense: int) -> list[str]:
    return ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense)


def _head(values: ConfigValues) -> HeadKind:
    scores = [[name + _HEADS["score"]] for name in (_DEEPSEEK, *_CLASSES.values())]
    return "score" if values.get("architectures") in scores else "tokens"


def _mtp_depth(values: ConfigValues) -> int:
    """Returns the number of MTP modules under either of its names; the default is 1, as in transformers."""
    keys = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if values.get(key) is not None]
    depths = [values.whole_number(key, 0) for key in keys]
    if len(set(depths)) > 1:
        raise values.error(keys[1], f"must equal {keys[0]} {depths[0]}, is {depths[1]}")
    return depths[0] if depths else 1


def _mtp_hidden(values: ConfigValues) -> Any:
    state = values.get("mtp_hidden") or "post_norm"
    if state not in ("post_norm", "pre_norm"):
        raise values.error("mtp_hidden", f"must be post_norm or pre_norm, is {state!r}")
    return state


def _check_token_ids(values: ConfigValues) -> None:
    """Checks that token ids, which are written again unchanged, are valid for other readers."""
    for key in TOKEN_ID_KEYS:
        value = values.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and not all(type(item) is int for item in ids):
            raise values.error(key, f"must be a token id or null, is {format_value(value)}")


def _check_groups(values: ConfigValues, config: MlaConfig) -> None:
    experts = config.num_routed_experts
    groups = config.num_expert_groups
    limit = config.num_limited_groups
    _check_equal(
        values,
        {
            "num_key_value_heads": config.num_heads,
            "qk_head_dim": config.qk_head_dim,
            "head_dim": config.qk_rope_head_dim,
            "num_local_experts": experts,
            "num_experts": experts,
        },
    )
    _check_even(values, "qk_rope_head_dim", config.qk_rope_head_dim)
    if experts % groups:
        raise values.error("n_group", f"must divide n_routed_experts {experts}, is {groups}")
    if limit > groups:
        raise values.error("topk_group", f"must be at most n_group {groups}, is {limit}; nearest: {groups}")
    within = limit * (experts // groups)
    _check_chosen(values, config.num_experts_per_token, within, f"the experts of topk_group {limit} groups")


def _check_equal(values: ConfigValues, sizes: Mapping[str, int]) -> None:
    for key, size in sizes.items():
        if values.get(key) is not None and values.whole_number(key, 1) != size:
            raise values.error(key, f"must be {size} with the other sizes, is {values.get(key)}; nearest: {size}")


def _check_even(values: ConfigValues, key: str, size: int) -> None:
    if size % 2:
        raise values.error(key, f"must be even, is {size}")


def _check_chosen(values: ConfigValues, number: int, most: int, words: str) -> None:
    if number > most:
        rule = f"must be at most {most}, {words}, is {number}; nearest: {most}"
        raise values.error("num_experts_per_tok", rule)


def read_rope(values: ConfigValues, max_position: int) -> tuple[float, RopeScaling]:
    """Returns the base of the rotation and its scaling, by default from `max_position` tokens on.

    Raises:
        HfError: both spellings are present, the kind is not supported, or a value is missing or wrong.
    """
    spellings = [key for key in ("rope_scaling", "rope_parameters") if values.get(key)]
    if len(spellings) > 1:
        raise values.error("rope_parameters", "must not be given together with rope_scaling, is")
    inner = values.inside(spellings[0]) if spellings else None
    outer_theta = values.get("rope_theta")
    if inner is None or inner.get("rope_theta") is None:
        theta = values.number("rope_theta")
    else:
        theta = inner.number("rope_theta")
        if outer_theta is not None and outer_theta != theta:
            raise values.error(
                "rope_theta", f"must equal {spellings[0]}.rope_theta {theta}, is {format_value(outer_theta)}"
            )
    for section in (values, *([inner] if inner else [])):
        if section.get("partial_rotary_factor") is not None and section.number("partial_rotary_factor") != 1:
            raise section.error("partial_rotary_factor", f"must be 1, is {section.get('partial_rotary_factor')}")
    if inner is None or _kind(inner) == "default":
        _check_plain_length(values, max_position)
        return theta, PlainRope(kind="plain")
    if theta <= 1:
        raise values.error("rope_theta", f"must be above 1 for YaRN, is {theta}")
    return theta, _read_yarn(inner, _original_length(values, inner, max_position))


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling`, for which transformers and this model agree."""
    match scaling:
        case PlainRope():
            return {"rope_theta": theta, "rope_scaling": None}
        case YarnRope() as yarn:
            keys: dict[str, Any] = {
                "type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_max_position_tokens,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
            }
            factor = yarn_temperature(yarn.factor, yarn.mscale) / yarn_temperature(yarn.factor, yarn.mscale_all_dim)
            if factor != _default_factor(yarn.factor, yarn.mscale, yarn.mscale_all_dim):
                keys["attention_factor"] = factor
            return {"rope_theta": theta, "rope_scaling": keys}
        case _:
            assert_never(scaling)


def _kind(inner: ConfigValues) -> Literal["default", "yarn"]:
    kinds = [inner.get(key) for key in ("rope_type", "type") if inner.get(key) is not None]
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise inner.error("type", f"must equal rope_type {format_value(kinds[0])}, is {format_value(kinds[1])}")
    match kinds[0] if kinds else "default":
        case "default":
            return "default"
        case "yarn":
            return "yarn"
        case other:
            raise inner.error("rope_type", f"must be default or yarn, is {format_value(other)}")


def _check_plain_length(values: ConfigValues, max_position: int) -> None:
    key = "original_max_position_embeddings"
    if values.get(key) is not None and values.whole_number(key, 1) != max_position:
        raise values.error(
            key,
            f"must be max_position_embeddings {max_position} without rope_scaling, is {values.get(key)}; "
            f"nearest: {max_position}",
        )


def _original_length(values: ConfigValues, inner: ConfigValues, max_position: int) -> int:
    key = "original_max_position_embeddings"
    lengths = [section.whole_number(key, 1) for section in (inner, values) if section.get(key) is not None]
    if len(set(lengths)) > 1:
        raise values.error(key, f"must equal the one of rope_scaling, {lengths[0]}, is {lengths[1]}")
    return lengths[0] if lengths else max_position


def _read_yarn(inner: ConfigValues, original_length: int) -> YarnRope:
    factor = inner.number("factor")
    if factor < 1:
        raise inner.error("factor", f"must be at least 1, is {factor}; nearest: 1")
    if inner.get("truncate") not in (None, True):
        raise inner.error("truncate", f"must be true, is {format_value(inner.get('truncate'))}")
    for key in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        if inner.get(key) and not 1 / _MOST_OF_YARN <= inner.number(key) <= _MOST_OF_YARN:
            raise inner.error(key, f"must be at most {_MOST_OF_YARN:g} and its inverse at most so, is {inner.get(key)}")
    fast = inner.number("beta_fast") if inner.get("beta_fast") else 32.0
    slow = inner.number("beta_slow") if inner.get("beta_slow") else 1.0
    if fast < slow:
        raise inner.error("beta_fast", f"must be at least beta_slow {slow:g}, is {fast:g}; nearest: {slow:g}")
    mscale, all_dim = _read_scales(inner, factor)
    return YarnRope(
        kind="yarn",
        factor=factor,
        original_max_position_tokens=original_length,
        beta_fast=fast,
        beta_slow=slow,
        mscale=mscale,
        mscale_all_dim=all_dim,
    )


def _read_scales(inner: ConfigValues, factor: float) -> tuple[float, float]:
    """Returns `mscale` and `mscale_all_dim` with which `model.attention.form` scales as transformers does."""
    mscale, all_dim = (inner.number(key) if inner.get(key) else 0.0 for key in ("mscale", "mscale_all_dim"))
    if inner.get("attention_factor") is None:
        if (mscale and all_dim) or factor == 1:
            return mscale, all_dim
        wanted = _default_factor(factor, mscale, all_dim)
    else:
        wanted = inner.number("attention_factor")
        computed = yarn_temperature(factor, mscale) / yarn_temperature(factor, all_dim)
        if math.isclose(wanted, computed, rel_tol=_PRECISION):
            return mscale, all_dim
    if not all_dim and wanted == yarn_temperature(factor, 1.0):
        return 1.0, 0.0
    least = 1 / yarn_temperature(factor, all_dim)
    if factor == 1 or wanted < least:
        rule = "must be 1 with factor 1" if factor == 1 else f"must be at least {least}, as mscale is not negative"
        raise inner.error("attention_factor", f"{rule}, is {wanted}")
    return (wanted * yarn_temperature(factor, all_dim) - 1) / (0.1 * math.log(factor)), all_dim


def _default_factor(factor: float, mscale: float, all_dim: float) -> float:
    if mscale and all_dim:
        return yarn_temperature(factor, mscale) / yarn_temperature(factor, all_dim)
    return yarn_temperature(factor, 1.0)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHARED_KEYS = _words(
    """
    model_type architectures torch_dtype dtype quantization_config vocab_size hidden_size num_hidden_layers
    intermediate_size num_attention_heads num_key_value_heads head_dim num_local_experts num_experts num_experts_per_tok
    moe_intermediate_size rms_norm_eps max_position_embeddings original_max_position_embeddings initializer_range
    rope_theta rope_scaling rope_parameters partial_rotary_factor attention_bias attention_dropout hidden_act
    norm_topk_prob tie_word_embeddings
    """
)
_KEYS_OF = {
    "mla": _words(
        """
        first_k_dense_replace q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim
        n_routed_experts n_shared_experts n_group topk_group routed_scaling_factor num_nextn_predict_layers
        num_mtp_layers mtp_hidden group_score_experts rope_interleave scoring_func topk_method moe_layer_freq
        mlp_layer_types
        """
    ),
    "gqa": _words("mlp_only_layers decoder_sparse_step use_sliding_window sliding_window max_window_layers"),
}
READ_KEYS = _SHARED_KEYS.union(*_KEYS_OF.values())
"""Keys that describe an architecture or the stored types: exports write them from the model, never copy them."""

HARMLESS_KEYS = _words(
    """
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id transformers_version auto_map use_cache aux_loss_alpha seq_aux ep_size pretraining_tp
    router_aux_loss_coef output_router_logits output_attentions output_hidden_states output_scores return_dict
    return_dict_in_generate chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix use_bfloat16 torchscript pruned_heads attn_implementation
    gradient_checkpointing tf_legacy_loss max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values unsloth_version
    """
)
"""Keys about training, generation and files, which no forward pass reads."""

# Words in the names of keys by which published architectures differ: windows, soft caps, multipliers, indexers, gates.
_WORDS = _words(
    """
    softcap softcapping capping cap caps multiplier multipliers sliding window windows index indexer limit limits layer
    layers types bias biases qk norm norms layernorm normalization rope rotary scale scales scaling scaler moe expert
    experts attention attn mlp ffn router routing gate gates gated gating hidden dim dims rank head heads interleave
    interleaved activation act clip clamp residual embedding embeddings embed logit logits mtp nextn predict hc
    hyper compress compression compressed sparse sparsity block blocks state conv ssm mamba linear kv mla dsa nsa hash
    lora position positions alibi group groups topk theta factor shared pattern freq latent sink sinks engram ngram
    recurrent tie tied dropout causal renormalize normalize
    """
)
# A factor of one has no effect.
_FACTORS = _words("multiplier multipliers scale scales scaling factor")
# Features that the network has and false would remove. `use_qk_norm: false` removes none: queries and keys have no
# norm.
_PRESENT = _words("norm norms layernorm rope rotary moe mla causal renormalize normalize")


def check_unknown_keys(values: ConfigValues, keys: Mapping[str, Any]) -> None:
    """Raises an `HfError` for unknown keys that may change what the network computes."""
    for key in unknown_keys(keys):
        words = set(key.lower().split("_"))
        if words & _WORDS and not _is_neutral(key, words, keys[key]):
            raise values.error(
                key,
                f"must be absent or null, as it may change the network and is not supported, is "
                f"{format_value(keys[key])}; nearest: remove the key if the weights do not depend on it",
            )


def unknown_keys(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the keys that are neither read in files of this type nor known to be harmless, sorted."""
    form = _FORMS.get(str(keys.get("model_type")))
    known_keys = HARMLESS_KEYS | (_SHARED_KEYS | _KEYS_OF[form] if form else READ_KEYS)
    return tuple(sorted(key for key in keys if key not in known_keys and not key.startswith("_")))


def carried_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that an export copies: all but those of the architecture and the stored types.

    It includes an unusual `model_type`, by which servers choose, and `quantization_config`, which says how scales
    round.
    """
    carried = {key: value for key, value in keys.items() if key not in READ_KEYS}
    if keys.get("model_type") != "deepseek_v3":
        carried["model_type"] = keys.get("model_type")
    if keys.get("quantization_config") is not None:
        carried["quantization_config"] = keys["quantization_config"]
    return carried


def _is_neutral(key: str, words: set[str], value: Any) -> bool:
    if value is None or value in ([], {}, ""):
        return True
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if words & _FACTORS:
        return type(value) in (int, float) and value == 1
    if value is False:
        return "qk" in words or not words & _PRESENT
    return type(value) in (int, float) and value == 0

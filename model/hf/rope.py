"""Reads rotary embedding from `config.json` in two spellings, and writes the released one.

YaRN follows transformers. With L = ln(factor), cos and sin are scaled by `attention_factor`. Its default is (0.1 mscale
L + 1) / (0.1 mscale_all_dim L + 1) if both are given and not 0, else 0.1 L + 1. Scores are scaled by (0.1
mscale_all_dim L + 1)^2 if `mscale_all_dim` is given.
"""

import math
from typing import Any, Literal, assert_never

from model.config import PlainRope, RopeScaling, YarnRope, yarn_temperature
from model.hf.config_values import ConfigValues
from model.hf.files import shown

_PRECISION = 1e-9


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
            raise values.error("rope_theta", f"must equal {spellings[0]}.rope_theta {theta}, is {shown(outer_theta)}")
    for place in (values, *([inner] if inner else [])):
        if place.get("partial_rotary_factor") is not None and place.number("partial_rotary_factor") != 1:
            raise place.error("partial_rotary_factor", f"must be 1, is {place.get('partial_rotary_factor')}")
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
        raise inner.error("type", f"must equal rope_type {shown(kinds[0])}, is {shown(kinds[1])}")
    match kinds[0] if kinds else "default":
        case "default":
            return "default"
        case "yarn":
            return "yarn"
        case other:
            raise inner.error("rope_type", f"must be default or yarn, is {shown(other)}")


def _check_plain_length(values: ConfigValues, max_position: int) -> None:
    key = "original_max_position_embeddings"
    if values.get(key) is not None and values.whole(key, 1) != max_position:
        raise values.error(
            key,
            f"must be max_position_embeddings {max_position} without rope_scaling, is {values.get(key)}; "
            f"nearest: {max_position}",
        )


def _original_length(values: ConfigValues, inner: ConfigValues, max_position: int) -> int:
    key = "original_max_position_embeddings"
    lengths = [place.whole(key, 1) for place in (inner, values) if place.get(key) is not None]
    if len(set(lengths)) > 1:
        raise values.error(key, f"must equal the one of rope_scaling, {lengths[0]}, is {lengths[1]}")
    return lengths[0] if lengths else max_position


def _read_yarn(inner: ConfigValues, original_length: int) -> YarnRope:
    factor = inner.number("factor")
    if factor < 1:
        raise inner.error("factor", f"must be at least 1, is {factor}; nearest: 1")
    if inner.get("truncate") not in (None, True):
        raise inner.error("truncate", f"must be true, is {shown(inner.get('truncate'))}")
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
        own = yarn_temperature(factor, mscale) / yarn_temperature(factor, all_dim)
        if math.isclose(wanted, own, rel_tol=_PRECISION):
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

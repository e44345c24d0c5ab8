"""Registers this project's forms of attention. Imports no torch before a layer is built."""

from typing import Any

from model.config import ATTENTION_FORMS, AttentionForm, GqaConfig, MlaConfig


def _build_mla(*arguments: Any) -> Any:
    from model.attention.mla import LatentAttention

    return LatentAttention(*arguments)


ATTENTION_FORMS.register(
    "mla",
    AttentionForm(
        summary="keys and values from one latent, as in DeepSeek-V3",
        config=MlaConfig,
        build=_build_mla,
        small={"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        takes_parts=True,
        has_fp8=True,
    ),
)


def _build_gqa(*arguments: Any) -> Any:
    from model.attention.gqa import GroupedAttention

    return GroupedAttention(*arguments)


ATTENTION_FORMS.register(
    "gqa",
    AttentionForm(
        summary="heads of keys and values for groups of heads of queries, as in Qwen3",
        config=GqaConfig,
        build=_build_gqa,
        small={"num_kv_heads": 1, "head_dim": 8, "qk_norm": True},
    ),
)

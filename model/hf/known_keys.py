"""Classifies the keys of `config.json`: read, harmless, or able to change the network.

*Read* keys describe the architecture (`model.hf.config`). *Harmless* keys do not affect what the network computes and
are copied. An unknown key whose name contains a word of `_WORDS`, such as `sliding_window`, may change the network and
is rejected unless its value is neutral. Any other unknown key is copied, and commands report it.
"""

from collections.abc import Mapping
from typing import Any

from model.hf.files import ConfigValues, shown


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


READ_KEYS = _words(
    """
    model_type architectures torch_dtype dtype quantization_config vocab_size hidden_size num_hidden_layers
    first_k_dense_replace intermediate_size num_attention_heads num_key_value_heads q_lora_rank kv_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim head_dim n_routed_experts num_local_experts num_experts
    n_shared_experts num_experts_per_tok moe_intermediate_size n_group topk_group routed_scaling_factor rms_norm_eps
    max_position_embeddings original_max_position_embeddings num_nextn_predict_layers num_mtp_layers mtp_hidden
    initializer_range rope_theta rope_scaling rope_parameters partial_rotary_factor rope_interleave attention_bias
    attention_dropout hidden_act norm_topk_prob scoring_func topk_method moe_layer_freq tie_word_embeddings
    """
)
"""Keys that describe the architecture or the stored types: exports write them from the model, never copy them."""

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
                f"must be absent or null, as it may change the network and is not supported, is {shown(keys[key])}; "
                f"nearest: remove the key if the weights do not depend on it",
            )


def unknown_keys(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the keys that are neither read nor known to be harmless, sorted."""
    known = READ_KEYS | HARMLESS_KEYS
    return tuple(sorted(key for key in keys if key not in known and not key.startswith("_")))


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

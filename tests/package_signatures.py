"""Signatures of the optional packages that adapters call, read in the sources of the newest versions named here.

A newer version is recorded by reading its source again. C++ functions have the names of their bindings.
"""

from collections.abc import Callable
from inspect import Signature, signature
from typing import Any

VERSIONS = {
    "deep_ep": "2.1.0 (commit dd758ca, 2026-07-14)",
    "deep_gemm": "2.6.1 (commit 54e2261, 2026-06-23)",
    "flash_attn": "2.8.3.post1 (FlashAttention-2)",
    "flash_attn_interface": "3.0.0 (FlashAttention-3, commit 0251105, 2026-08-15)",
    "flash_attn.cute": "FlashAttention-4, commit 0251105, 2026-08-15",
}

_SCALES = "recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', disable_ue8m0_cast=False"
_EVENTS = "previous_event=None, previous_event_before_epilogue=None, async_with_compute_stream=False"
_HOPPER = "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False"
_CUTE = "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False"

_RECORDED = {
    "deep_ep.ElasticBuffer": (
        "group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0, "
        "use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True, "
        "prefer_overlap_with_compute=True, sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300, "
        "num_gpu_timeout_secs=100, explicitly_destroy=False"
    ),
    "deep_ep.destroy": "",
    "deep_ep.get_logical_domain_size": "",
    "deep_ep.dispatch": (
        "x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None, "
        f"num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, {_EVENTS}, "
        "allocate_on_comm_stream=False, handle=None, do_handle_copy=True, do_cpu_sync=None, do_expand=False, "
        "do_zero_padding=False, use_tma_aligned_col_major_sf=False"
    ),
    "deep_ep.combine": (
        f"x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, {_EVENTS}, allocate_on_comm_stream=False"
    ),
    "deep_gemm.set_num_sms": "new_num_sms, /",
    "deep_gemm.fp8_gemm_nt": f"a, b, d, c=None, {_SCALES}",
    "deep_gemm.m_grouped_fp8_gemm_nt_contiguous": (
        f"a, b, d, grouped_layout, {_SCALES}, use_psum_layout=False, ensure_zero_padding=True, "
        "expected_m_for_psum_layout=None"
    ),
    "deep_gemm.k_grouped_fp8_gemm_nt_contiguous": (
        "a, b, d, ks_cpu, grouped_layout, c=None, recipe=(1, 1, 128), compiled_dims='mn', use_psum_layout=False"
    ),
    "flash_attn.flash_attn_func": (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn.flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None"
    ),
    "flash_attn_interface.flash_attn_func": (
        f"q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        f"{_HOPPER}, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_interface.flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        f"softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, {_HOPPER}, "
        "sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn.cute.flash_attn_func": (
        f"q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, {_CUTE}, score_mod=None, "
        "score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, "
        "block_sparse_tensors_bwd=None, return_lse=False"
    ),
    "flash_attn.cute.flash_attn_varlen_func": (
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
        f"softmax_scale=None, causal=False, {_CUTE}, score_mod=None, score_mod_bwd=None, mask_mod=None, "
        "block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, "
        "seqlen_k_per_split=None, disable_scheduler_metadata=False"
    ),
}

SIGNATURES: dict[str, Signature] = {name: signature(eval(f"lambda {text}: None")) for name, text in _RECORDED.items()}


class RecordedCalls:
    """Replaces functions of the packages; each call must bind to the recorded signature."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def function(self, name: str, result: Callable[..., Any] = lambda *args, **kwargs: None) -> Callable[..., Any]:
        """Returns a function with the recorded signature of a name, which returns `result` of its arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                SIGNATURES[name].bind(*args, **kwargs)
            except TypeError as error:
                package = max((each for each in VERSIONS if name.startswith(f"{each}.")), key=len)
                raise AssertionError(f"{name} of {package} {VERSIONS[package]}: {error}") from None
            self.names.add(name)
            return result(*args, **kwargs)

        call.__signature__ = SIGNATURES[name]  # type: ignore[attr-defined]
        return call

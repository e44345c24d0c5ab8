"""Adapters call optional packages as the newest recorded versions take it: a wrong argument of a real call fails."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed

from comm.dispatch.deepep.dispatcher import ExpertBuffer
from comm.dispatch.deepep.package import BufferShape
from kernels import launch
from kernels.attention import ATTENTION
from kernels.attention.documents import Documents
from kernels.gemm import deep_gemm
from tests.kernels import agreement_gemm, agreement_grouped
from tests.package_signatures import SIGNATURES, VERSIONS, RecordedCalls


def _module(calls: RecordedCalls, package: str, result: Any = lambda *args, **kwargs: None) -> ModuleType:
    module = ModuleType(package)
    for name in SIGNATURES:
        if name.rpartition(".")[0] == package:
            setattr(module, name.rpartition(".")[2], calls.function(name, result))
    return module


def _refuse(*operands: Any) -> Any:
    pytest.fail("the package serves this shape")


def _call_deep_gemm(calls: RecordedCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", _module(calls, "deep_gemm"))
    deep_gemm.gemm_fp8(*agreement_gemm.operands((5, 192, 256)), torch.bfloat16, fallback=_refuse)
    deep_gemm.gemm_fp8_columns(*agreement_gemm.column_operands((64, 128, 384)), fallback=_refuse)
    counts = (3, 130)
    deep_gemm.grouped_rows_fp8(*agreement_grouped.operands(counts, 64, 128), counts, torch.bfloat16)
    deep_gemm.grouped_weight_fp8(*agreement_grouped.column_operands(counts, 64, 128), counts)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "has_deep_gemm", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch._C, "_set_sm_carveout_experimental", lambda count: None)
    monkeypatch.setattr(launch, "_RESERVED_SMS", {})
    launch.reserve_sms(device, 20)


def _call_flash_attention(calls: RecordedCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [torch.zeros(1, 2, 6, 8) for _ in "qkv"]
    documents = Documents.from_positions(torch.tensor([[0, 1, 2, 0, 1, 2]]))
    for name in ("flash_attention", "flash_attention_3", "flash_attention_4"):
        kernel = ATTENTION.get(name)
        assert kernel.package is not None
        monkeypatch.setitem(sys.modules, kernel.package, _module(calls, kernel.package, lambda q, k, v, **_: v))
        for packed in (None, documents):
            query, key, value = heads
            assert kernel.attend(query, key, value, 0.5, packed).shape == value.shape


def _call_deepep(calls: RecordedCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **kwargs: Any) -> SimpleNamespace:
        rows = torch.zeros(3, 256)
        results = {
            "get_logical_domain_size": (1, 2),
            "dispatch": (rows, torch.zeros(3, 2), None, None, None),
            "combine": (rows, None, None),
            "destroy": None,
        }
        returns = {name: calls.function(f"deep_ep.{name}", lambda *_, r=r, **__: r) for name, r in results.items()}
        return SimpleNamespace(**returns)

    library = SimpleNamespace(ElasticBuffer=calls.function("deep_ep.ElasticBuffer", opened), topk_idx_t=torch.int64)
    monkeypatch.setattr(distributed, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor, group: None)
    shape = BufferShape(max_tokens=8, hidden_size=256, num_choices=2, timeout_seconds=1.0)
    buffer = ExpertBuffer(library, mock.Mock(), 4, shape)
    rows = torch.zeros(3, 256, dtype=torch.bfloat16)
    buffer.dispatch(rows, torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    buffer.dispatch_again(rows, "handle")
    buffer.combine(rows, torch.zeros(3, 2), "handle")
    buffer.close()


def test_every_call_binds_to_the_signature_of_the_recorded_version(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = RecordedCalls()
    _call_deep_gemm(calls, monkeypatch)
    _call_flash_attention(calls, monkeypatch)
    _call_deepep(calls, monkeypatch)
    assert calls.names == set(SIGNATURES)


def test_a_wrong_argument_names_function_and_version() -> None:
    wrong = RecordedCalls().function("flash_attn.cute.flash_attn_func")
    with pytest.raises(AssertionError, match=r"^flash_attn\.cute\.flash_attn_func of flash_attn\.cute .*sm_margin"):
        wrong(Tensor(), Tensor(), Tensor(), sm_margin=4)
    assert {name.rpartition(".")[0] for name in SIGNATURES} == set(VERSIONS)

"""Loads a whole model from a checkpoint in Hugging Face form, and saves it in the form that it had."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from kernels.quantize.layout import QuantizedBlocks
from kernels.quantize.reference import codes_128x128, dequantize_128x128
from model.config import ModelConfig
from model.hf.files import HfError
from model.hf.names import (
    BLOCK,
    EMBEDDING,
    Stored,
    StoredDtype,
    copied_from,
    scale_name,
    stored_tensors,
    weights,
    with_scales,
)
from model.hf.reader import TORCH_DTYPES, HfReader, HfSource, stored_dtype
from model.hf.writer import MAX_SHARD_BYTES, Extras, Fp8Scales, rotary_plan, write_hf
from model.transformer import Transformer, named_tensors

_ROWS = 8 * BLOCK
_NO_SOURCE = HfSource(dtypes={}, scales={}, config={}, rotary={})


class LoadedTransformer(Transformer):
    """A model that records how its checkpoint stored it, so that `save_hf` can write the same bytes again."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, source: HfSource) -> None:
        super().__init__(config, LocalDispatcher(config.num_routed_experts), dtype)
        self.source = source


def load_hf(path: Path | str, dtype: torch.dtype, *, drop_mtp: bool = False) -> Transformer:
    """Loads a checkpoint's whole model to the CPU, with its MTP modules if the checkpoint has them.

    Args:
        dtype: type of the weights; FP8 weights are dequantized. Correction biases stay float32.
        drop_mtp: whether to leave out MTP modules, which are then neither checked nor read.

    Raises:
        HfError: something in the checkpoint is missing, superfluous or wrong.
    """
    reader = HfReader(path, drop_mtp=drop_mtp)
    model = LoadedTransformer(reader.config, dtype, reader.source())
    reader.fill(named_tensors(model))
    return model


def save_hf(
    model: Transformer,
    path: Path | str,
    dtype: torch.dtype | Literal["fp8"] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model as a checkpoint that `transformers` loads, to an absent or empty folder.

    Args:
        dtype: type of the stored weights. "fp8" stores in FP8 what the released checkpoint has in FP8, the rest in
            bfloat16. None stores every weight in the type that `load_hf` found if that is exact, else in the model's
            type; FP8 is used only if each weight found in FP8 is unchanged. Correction biases are float32, or as found.
        max_shard_bytes: largest size of a file's data, unless one tensor is larger.

    Raises:
        HfError: the model is a part, a value is not finite, or writing fails. Nothing is left behind.
    """
    named = named_tensors(model)
    config = model.config
    for name, shape in weights(config):
        if 0 not in shape and (copied_from(name) or name) not in named:
            raise HfError(path, name, "must be in the model that is written, is not: the model is a part")
    source = model.source if isinstance(model, LoadedTransformer) else _NO_SOURCE
    if dtype == "fp8":
        plan = stored_tensors(config, dtype="BF16", fp8=True)
    else:
        plan = stored_tensors(config, dtype=stored_dtype(dtype or named[EMBEDDING].dtype), fp8=False)
    scales = {name: scale for name, scale in source.scales.items() if _is_exact(named[name], scale)}
    if dtype is None:
        plan = _as_stored(plan, named, source, fp8=len(scales) == len(source.scales))
    quantization = source.config.get("quantization_config") or {}
    plan |= rotary_plan(source.rotary)
    write_hf(
        Path(path),
        config,
        plan,
        lambda name: source.rotary[name] if name in source.rotary else named[name],
        scales=Fp8Scales(by_name=scales, power_of_two=quantization.get("scale_fmt") == "ue8m0"),
        extras=Extras(config=source.config, files={}),
        max_shard_bytes=max_shard_bytes,
    )


def _as_stored(
    plan: Mapping[str, Stored], named: Mapping[str, Tensor], source: HfSource, *, fp8: bool
) -> dict[str, Stored]:
    stored_plan: dict[str, Stored] = {}
    for name, stored in plan.items():
        dtype = source.dtypes.get(name)
        if dtype is None:
            # Weights without elements are optional: they are written only if the checkpoint had them.
            if stored.num_elements or not source.dtypes:
                stored_plan[name] = stored
        elif dtype == "F8_E4M3":
            scales = source.dtypes[scale_name(name)]
            stored_plan |= with_scales(name, stored.shape, scales) if fp8 else {name: stored}
        else:
            keeps_dtype = not stored.num_elements or _holds(dtype, named[copied_from(name) or name])
            stored_plan[name] = Stored(stored.shape, dtype) if keeps_dtype else stored
    return stored_plan


def _holds(dtype: StoredDtype, values: Tensor) -> bool:
    runs = values.split(_ROWS)
    return all(torch.equal(rows.to(TORCH_DTYPES[dtype]).to(rows.dtype), rows) for rows in runs)


def _is_exact(values_ND: Tensor, scales_MT: Tensor) -> bool:
    for block, rows_RD in enumerate(values_ND.split(BLOCK)):
        scales_1T = scales_MT[block : block + 1].to(rows_RD.device)
        codes_RD = codes_128x128(rows_RD, scales_1T)
        if not torch.equal(dequantize_128x128(QuantizedBlocks(codes_RD, scales_1T), rows_RD.dtype), rows_RD):
            return False
    return True

"""Contenders that a kernel is timed against: plain PyTorch, torch's products, and DeepGEMM if it is installed.

Shape legend: M rows, N columns and K depth of a product.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Literal, NamedTuple, NoReturn, assert_never

import torch
from torch import Tensor
from torch.nn import functional

import kernels.expert_mlp.grouped as native
from kernels.quantize.layout import Quantized, QuantizedBlocks
from tests.kernels.launches import Call, Launch, Product, Tensors

OURS = "ours"
PLAIN = "plain torch"
BF16 = "torch bf16"
DEEP_GEMM = "DeepGEMM"
NAMES = (PLAIN, BF16, "torch FP8 block-wise", "torch FP8 row-wise", "torch FP8 tensor-wise", DEEP_GEMM)

Recipe = Literal["block-wise", "row-wise", "tensor-wise"]
RECIPES: tuple[Recipe, ...] = ("block-wise", "row-wise", "tensor-wise")
_SCALES_ALIGNMENT = 4
PRODUCTS = ("gemm_fp8", "gemm_fp8_columns")
GROUPED_PRODUCTS = ("grouped_rows_fp8", "grouped_weight_fp8")


class Contenders(NamedTuple):
    """Calls by name, ours first; and a line for each that did not run."""

    calls: dict[str, Call]
    refusals: list[str]


Make = Callable[[torch.device], Call]


def contenders(launch: Launch, device: torch.device, makers: Sequence[Mapping[str, Make]]) -> Contenders:
    """Returns our own call, and for each of the others the first that the device supports; each runs once."""
    is_fp8_product = launch.product is not None and launch.product.is_fp8
    found = Contenders({OURS: launch.call(device, _tuned() if is_fp8_product else None)}, [])
    found.calls[OURS]()
    for alternatives in makers:
        for name, make in alternatives.items():
            try:
                call = make(device)
                call()
            except Exception as error:  # packages raise any type for unsupported operands
                found.refusals.append(f"{launch.name}, {launch.shape}: {name}: {_first_line(error)}")
            else:
                found.calls[name] = call
                break
    return found


def _tuned() -> SimpleNamespace:
    """Returns our products in FP8, which cache the tuned tiling of every shape."""
    from kernels.gemm import tuned as gemm
    from kernels.gemm import tuned as grouped

    found = {name: getattr(gemm, name) for name in PRODUCTS}
    return SimpleNamespace(**found, **{name: getattr(grouped, name) for name in GROUPED_PRODUCTS})


def others_of(launch: Launch, has_deep_gemm: bool) -> list[dict[str, Make]]:
    """Returns the contenders of a launch; of each dictionary the first that works is timed.

    Args:
        has_deep_gemm: whether the package is installed and made for the device.
    """
    found: list[dict[str, Make]] = []
    if launch.reference is not None and launch.product is None:
        found.append({PLAIN: partial(launch.call, functions=import_module(launch.reference))})
    if launch.product is not None:
        found.append({BF16: partial(bf16_product, launch.product)})
        if launch.product.is_fp8 and not launch.product.is_gradient and not launch.product.counts:
            found.append({f"torch FP8 {recipe}": partial(fp8_product, launch.product, recipe) for recipe in RECIPES})
        if launch.product.is_fp8 and has_deep_gemm:
            found.append({DEEP_GEMM: partial(launch.call, functions=deep_gemm(launch.product))})
    return found


def deep_gemm(product: Product) -> object:
    """Returns the package's products, which reject unsupported operands."""
    module = import_module("kernels.gemm.deep_gemm")
    names = GROUPED_PRODUCTS if product.counts else PRODUCTS
    return SimpleNamespace(**{name: partial(getattr(module, name), fallback=_refuse) for name in names})


def _refuse(*operands: object) -> NoReturn:
    raise ValueError("DeepGEMM: must be given operands that it takes")


def bf16_product(product: Product, device: torch.device) -> Call:
    """Runs the same product by torch in bf16, in the memory layout of a model.

    A gradient sums over the rows of both operands.
    """
    tensors, counts = Tensors(device), product.counts
    if product.is_gradient:
        grad, rows = tensors.normal(product.depth, product.num_rows), tensors.normal(product.depth, product.num_columns)
        return partial(native.grouped_weight, grad, rows, counts) if counts else lambda: torch.mm(grad.t(), rows)
    rows = tensors.normal(product.num_rows, product.depth)
    if counts:
        weights = tensors.normal(len(counts), product.num_columns, product.depth)
        return partial(native.grouped_rows, rows, weights, counts)
    weight = tensors.normal(product.num_columns, product.depth)
    return lambda: torch.mm(rows, weight.t())


def fp8_product(product: Product, recipe: Recipe, device: torch.device) -> Call:
    """Runs the same product of rows and weight by torch in FP8, with as many scales as the recipe has."""
    tensors = Tensors(device)
    left = tensors.rows(product.num_rows, product.depth)
    right = tensors.blocks(product.num_columns, product.depth)
    return scaled_product(recipe, left.codes, right.codes, *scales_for(recipe, left, right))


def scales_for(recipe: Recipe, left: Quantized, right: QuantizedBlocks) -> tuple[Tensor, Tensor]:
    """Returns scales in torch's layout: block-wise with rows adjacent in memory, else the first of a row, or of all."""
    match recipe:
        case "block-wise":
            padded = functional.pad(right.scales, (0, -right.scales.shape[1] % _SCALES_ALIGNMENT))
            return left.scales.t().contiguous().t(), padded.t()
        case "row-wise":
            first = right.scales[:, :1].repeat_interleave(128, 0)[: right.codes.shape[0]]
            return left.scales[:, :1].contiguous(), first.t().contiguous()
        case "tensor-wise":
            return left.scales[0, 0].clone(), right.scales[0, 0].clone()
        case _ as other:
            assert_never(other)


def scaled_product(
    recipe: Recipe, left_MK: Tensor, right_NK: Tensor, left_scale: Tensor, right_scale: Tensor, fast: bool = False
) -> Call:
    """Runs `torch.nn.functional.scaled_mm` of codes, in bf16.

    If `fast`, sums are as exact as the tensor cores keep them.
    """
    kinds = functional.ScalingType
    scaling = {
        "block-wise": (kinds.BlockWise1x128, kinds.BlockWise128x128),
        "row-wise": (kinds.RowWise, kinds.RowWise),
        "tensor-wise": (kinds.TensorWise, kinds.TensorWise),
    }[recipe]
    return partial(
        functional.scaled_mm,
        left_MK,
        right_NK.t(),
        left_scale,
        scaling[0],
        right_scale,
        scaling[1],
        output_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

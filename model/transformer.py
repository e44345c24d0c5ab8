"""The network: the whole model, or the part that one rank holds.

It has the embedding and the additional parts of MTP modules (arXiv:2412.19437, section 2.2).
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comm.protocol import ALONE, ContextGroup, Dispatcher
from kernels.attention.documents import Documents
from kernels.rms_norm import inverse_rms, normalize_backward, rms_norm
from model.attention.form import Attention
from model.block import Block, RoutedExperts, run_block
from model.config import ATTENTION_FORMS, LAYER, Computing, ModelConfig
from model.linear import Projection, WeightSink, deliver_product, widen
from model.norm import RmsNorm, normed_linear
from model.objective import BALANCE, LossSums, MicroBatch, Objective, OutputHead
from model.precision.linears import Linears
from model.router import Router, Routing
from model.slices import RunPlace

BIAS = "e_score_correction_bias"
SCORE = "score.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Part of a model: layers by number (MTP modules follow the last layer), experts of each, both ends."""

    layers: tuple[int, ...]
    experts: range
    embedding: bool
    head: bool


def build_linears(computing: Computing) -> Linears:
    """Returns the implementation that a model's `computing.products` selects."""
    if computing.products == "own":
        from model.precision.plain import PlainLinears

        return PlainLinears(computing.recomputed)
    from model.precision.fp8_linears import Fp8Linears

    is_rounded = computing.products == "fp8_power_of_two"
    return Fp8Linears(
        power_of_two=is_rounded,
        recomputes_layers=LAYER in computing.recomputed,
        gradient_blocks=computing.gradient_blocks,
    )


def whole(config: ModelConfig) -> Part:
    """Returns the whole model as a part."""
    layers = tuple(range(config.num_layers + config.mtp_depth))
    return Part(layers=layers, experts=range(config.num_routed_experts), embedding=True, head=True)


class _SplitEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_BT: Tensor, sink: WeightSink) -> Tensor:
        ctx.save_for_backward(weight_VD, tokens_BT)
        ctx.sink = sink
        return functional.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (grad_BTD,) = grads
        weight_VD, tokens_BT = ctx.saved_tensors
        # The closure keeps the tokens and the gradient of their rows until W.
        vocab = len(weight_VD)
        ctx.sink.defer(
            weight_VD,
            lambda: torch.ops.aten.embedding_dense_backward(grad_BTD, tokens_BT, vocab, -1, False),  # noqa: FBT003
        )
        return None, None, None


class Embedding(nn.Module):
    """Token embedding, [vocabulary, hidden]."""

    def __init__(self, vocab: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden, dtype=dtype))

    def forward(self, tokens_BT: Tensor, sink: WeightSink | None) -> Tensor:
        """Looks up tokens, BT -> BTD. With a sink, the weight's gradient waits for its W."""
        if sink is None or not torch.is_grad_enabled():
            return functional.embedding(tokens_BT, self.weight)
        out: Tensor = _SplitEmbedding.apply(self.weight, tokens_BT, sink)  # type: ignore[no-untyped-call]
        return out


class SharedHead(nn.Module):
    """Own norm of an MTP module; the head's matrix belongs to the main model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, dtype)


class _Merge(torch.autograd.Function):
    """Computes [norm(embedded), norm(hidden)] projection^T; the backward computes both norms again."""

    @staticmethod
    def forward(
        ctx: Any,
        embedded: Tensor,
        hidden: Tensor,
        enorm_D: Tensor,
        hnorm_D: Tensor,
        projection_DE: Tensor,
        eps: float,
        sink: WeightSink | None,
    ) -> Tensor:
        ctx.save_for_backward(embedded, hidden, enorm_D, hnorm_D, projection_DE)
        ctx.eps = eps
        ctx.sink = sink
        return functional.linear(_normalize_both(embedded, hidden, enorm_D, hnorm_D, eps), projection_DE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        embedded, hidden, enorm_D, hnorm_D, projection_DE = ctx.saved_tensors
        grad = grads[0]
        eps = ctx.eps

        def rows() -> Tensor:
            # Both norms again: [..., 2 D]. They are cheaper to compute than to keep until W.
            return _normalize_both(embedded, hidden, enorm_D, hnorm_D, eps).flatten(0, -2)

        grad_projection = deliver_product(projection_DE, grad.flatten(0, -2), rows, ctx.sink)
        # The gradient of [norm(embedded), norm(hidden)], then back through each norm.
        grad_left, grad_right = (grad @ projection_DE).chunk(2, -1)
        grad_embedded, grad_enorm = normalize_backward(
            grad_left, embedded, inverse_rms(embedded, enorm_D, eps), enorm_D
        )
        grad_hidden, grad_hnorm = normalize_backward(grad_right, hidden, inverse_rms(hidden, hnorm_D, eps), hnorm_D)
        return grad_embedded, grad_hidden, grad_enorm, grad_hnorm, grad_projection, None, None


def _normalize_both(embedded: Tensor, hidden: Tensor, enorm_D: Tensor, hnorm_D: Tensor, eps: float) -> Tensor:
    return torch.cat((rms_norm(embedded, enorm_D, eps)[0], rms_norm(hidden, hnorm_D, eps)[0]), -1)


class MtpBlock(Block):
    """An MTP module: a whole MoE layer, the projection of [norm(embedding), norm(hidden)], a final norm."""

    def __init__(
        self, config: ModelConfig, experts: range, dtype: torch.dtype, attention: Attention, linears: Linears
    ) -> None:
        super().__init__(config, experts, dtype, attention, linears)
        hidden = config.hidden_size
        eps = config.norm_eps
        self.enorm = RmsNorm(hidden, eps, dtype)
        self.hnorm = RmsNorm(hidden, eps, dtype)
        self.eh_proj = Projection(2 * hidden, hidden, dtype)
        self.shared_head = SharedHead(config, dtype)

    def merge(self, embedded_BTD: Tensor, hidden_BTD: Tensor, sink: WeightSink | None) -> Tensor:
        """Returns the block's input, BTD, from the embedding k tokens ahead and the previous depth's state."""
        norms = (self.enorm.weight, self.hnorm.weight)
        out: Tensor = _Merge.apply(  # type: ignore[no-untyped-call]
            embedded_BTD, hidden_BTD, *norms, self.eh_proj.weight, self.enorm.eps, sink
        )
        return out


class Trunk(nn.Module):
    """Embedding, layers, final norm: the tensors below `model.` in the released checkpoint."""

    def __init__(
        self, config: ModelConfig, part: Part, dtype: torch.dtype, attention: Callable[[], Attention], linears: Linears
    ) -> None:
        super().__init__()
        blocks: dict[str, nn.Module] = {}
        for layer in sorted(part.layers):
            if layer >= config.num_layers:
                blocks[str(layer)] = MtpBlock(config, part.experts, dtype, attention(), linears)
            else:
                experts = None if layer < config.num_dense_layers else part.experts
                blocks[str(layer)] = Block(config, experts, dtype, attention(), linears)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype) if part.embedding else None
        self.layers = nn.ModuleDict(blocks)
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, dtype) if part.head else None


class Transformer(nn.Module):
    """A DeepSeek-V3-class model, or the part of it that a rank holds, with released names.

    Args:
        dispatcher: sends rows to experts when the model is called as a plain module.
        dtype: type of every weight, uninitialized until `initialize_weights`; the router bias stays float32.
        part: part of the model; None means the whole.
        context: ranks that share each sequence. Tokens, targets and hidden states are those that this rank holds
            (`comm.protocol`), documents are those of whole sequences. Decoding ignores it.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        dtype: torch.dtype,
        part: Part | None = None,
        computing: Computing = Computing(),  # noqa: B008  frozen
        context: ContextGroup = ALONE,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self._computing = computing
        self.balance_over = computing.balance_over
        self.dispatcher = dispatcher
        part = part or whole(config)
        self._linears = build_linears(computing)
        form = ATTENTION_FORMS.get(config.attention)
        build = partial(form.build, config, dtype, computing.attention, self._linears)
        self.model = Trunk(config, part, dtype, build, self._linears)
        head = Projection(config.hidden_size, config.num_head_rows, dtype) if part.head else None
        # The names of the released checkpoint, and of a sequence classifier in transformers.
        self.lm_head = head if config.head == "tokens" else None
        self.score = head if config.head == "score" else None

    @property
    def decodes_as_trained(self) -> bool:
        """Whether decoding must compute layers in the form of training (`Linears`)."""
        return self._linears.decodes_as_trained

    def weights_unchanged(self) -> AbstractContextManager[None]:
        """Returns a context in which no weight changes, so that each is quantized only once."""
        return self._linears.weights_unchanged()

    def block(self, layer: int) -> Block:
        """Returns the block of a layer of this part."""
        block = self.model.layers[str(layer)]
        assert isinstance(block, Block)
        return block

    def mtp_block(self, depth: int) -> MtpBlock:
        """Returns the MTP module of depth 1, 2, ..."""
        block = self.block(self.config.num_layers + depth - 1)
        assert isinstance(block, MtpBlock)
        return block

    def embed(self, tokens_BT: Tensor, sink: WeightSink | None) -> Tensor:
        """Looks up tokens, BT -> BTD."""
        assert self.model.embed_tokens is not None
        return self.model.embed_tokens(tokens_BT, sink)  # type: ignore[no-any-return]

    @property
    def output_head(self) -> Projection | None:
        """The output head of the configured kind, or None if another part holds it."""
        return self.lm_head if self.config.head == "tokens" else self.score

    @property
    def head_weight(self) -> Tensor:
        """Matrix of the output head: VD, or 1D for a score."""
        assert self.output_head is not None
        return self.output_head.weight

    def final_norm(self, depth: int) -> RmsNorm:
        """Returns the norm before the head: the main model's for depth 0, else that of the MTP module."""
        if depth:
            return self.mtp_block(depth).shared_head.norm
        assert self.model.norm is not None
        return self.model.norm

    def forward(self, tokens_BT: Tensor, documents: Documents | None = None) -> Tensor:
        """Computes the logits of the main head, float32 or wider: BT in int64 -> BTV."""
        hidden = self._trunk(tokens_BT, documents)
        keeps_normal = "norm" not in self._computing.recomputed
        return widen(normed_linear(hidden, self.final_norm(0), (self.head_weight,), None, keeps_normal=keeps_normal))

    def final_states(
        self,
        tokens_BT: Tensor,
        documents: Documents | None = None,
        routings: dict[int, Routing] | None = None,
    ) -> Tensor:
        """Computes the state of each token after the final norm, BT -> BTD; adds MoE layers to `routings`."""
        normal_BTD: Tensor = self.final_norm(0)(self._trunk(tokens_BT, documents, routings))
        return normal_BTD

    def _trunk(
        self, tokens_BT: Tensor, documents: Documents | None, routings: dict[int, Routing] | None = None
    ) -> Tensor:
        hidden = self.embed(tokens_BT, None)
        for layer in range(self.config.num_layers):
            hidden, routing = run_block(self.block(layer), self.dispatcher, hidden, documents)
            if routings is not None and routing is not None:
                routings[layer] = routing
        return hidden

    def head_loss(
        self,
        depth: int,
        hidden_BTD: Tensor,
        batch: MicroBatch,
        objective: Objective,
        sums: LossSums,
        sink: WeightSink | None,
        *,
        place: RunPlace = RunPlace(),  # noqa: B008  frozen
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the loss of one depth: the only place that calls the objective.

        Args:
            place: which micro-batch it is, and the slices that share the gradient of the head's matrix.

        Returns:
            The depth's part of the step's loss, and the input of the next depth's block, BTD, None after the last.
        """
        # The only norm that the head sees. MTP modules have their own, and share the matrix.
        normal = self.final_norm(depth)(hidden_BTD)
        head = OutputHead(depth, self.head_weight, None if place.sequences is None else place.sequences.heads[depth])
        task_loss = objective.loss(normal, head, batch, sink)
        sums.add_task(task_loss, head, (place.direction, place.micro_batch))
        if depth == self.config.mtp_depth:
            return task_loss.loss, None
        # The next depth predicts one token further, so it also gets the embedding of that token.
        state = normal if self.config.mtp_hidden == "post_norm" else hidden_BTD
        embedded = self.embed(batch.inputs_BT[depth + 1], sink)
        return task_loss.loss, self.mtp_block(depth + 1).merge(embedded, state, sink)

    def loss(self, batch: MicroBatch, objective: Objective, sums: LossSums) -> Tensor:
        """Computes the micro-batch's part of the step's loss through plain autograd; needs the whole model."""
        hidden = self.embed(batch.inputs_BT[0], None)
        total = torch.zeros((), dtype=torch.float64)
        for depth in range(self.config.mtp_depth + 1):
            # The trunk for depth 0, then the layer of one MTP module for each further depth.
            for layer in self._layers(depth):
                hidden, routing = run_block(self.block(layer), self.dispatcher, hidden, batch.documents, self.context)
                if routing is not None:
                    balance = routing.balance(batch.documents, self.context, self.balance_over)
                    sums.add(BALANCE, balance)
                    if objective.balance:
                        total = total + objective.balance * balance
            loss, onward = self.head_loss(depth, hidden, batch, objective, sums, None)
            total = total + loss
            if onward is not None:
                hidden = onward
        return total

    def _layers(self, depth: int) -> range:
        """Returns the layers between one head and the next: those of the trunk, then one per MTP module."""
        last = self.config.num_layers
        return range(last + depth - 1, last + depth) if depth else range(last)


def named_tensors(model: Transformer) -> dict[str, Tensor]:
    """Returns every weight and router bias by released name; routed experts are views of stacked weights."""
    named: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            named |= {f"{path}.{name}": view.detach() for name, view in module.per_expert()}
            continue
        named |= {f"{path}.{name}": weight.detach() for name, weight in module.named_parameters(recurse=False)}
        if isinstance(module, Router):
            named[f"{path}.{BIAS}"] = module.e_score_correction_bias
    return named


def routers(model: Transformer) -> dict[int, Router]:
    """Returns the router of every MoE layer of this part, by layer number."""
    layers = ((int(number), block) for number, block in model.model.layers.items() if isinstance(block, Block))
    return {number: block.moe.gate for number, block in layers if block.moe is not None}


def initialize_weights(model: Transformer, seed: int) -> None:
    """Draws N(0, initializer_range^2) by seed and name; norms are 1, router bias and score head 0.

    Weights are drawn on the host, one at a time on each of torch's threads: any device starts with the same numbers.
    """
    drawn: list[tuple[str, Tensor]] = []
    for name, weight in named_tensors(model).items():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        elif name.endswith(BIAS) or name == SCORE:
            weight.zero_()
        else:
            drawn.append((name, weight))

    def draw(named: tuple[str, Tensor]) -> None:
        name, weight = named
        # Each weight has its own generator, so any split into ranks draws the same numbers.
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        # Drawn in float32 and then rounded, so that all types of weights start alike.
        numbers = torch.empty(weight.shape, dtype=torch.float32)
        weight.copy_(numbers.normal_(0.0, model.config.initializer_range, generator=generator))

    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="initialize") as threads:
        list(threads.map(draw, drawn))

"""Computes the golden step from the README's formulas in plain PyTorch. Nothing of this project is imported.

`fault` names a planted error. Shape legend: N tokens, D inputs, M outputs, A rows of one expert.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

TILE = 128
NONE = -100
GRADIENT = 2.0**-117
LATENT_EPS = 1e-6


def quantized(x: Tensor, least: float = 1e-4, *, rounds: bool = False) -> Tensor:
    """Q, or P with `rounds`."""
    tiles = functional.pad(x, (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    scale = tiles.abs().amax(-1, keepdim=True).clamp(min=least) / 448
    if rounds:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return values.flatten(-2)[..., : x.shape[-1]]


def columns(x: Tensor, least: float = 1e-4, *, rounds: bool = False) -> Tensor:
    """C, or CP with `rounds`."""
    return quantized(x.t().contiguous(), least, rounds=rounds).t()


def blocks(w: Tensor) -> Tensor:
    """W."""
    out = torch.empty_like(w)
    for row in range(0, len(w), TILE):
        for column in range(0, w.shape[1], TILE):
            block = w[row : row + TILE, column : column + TILE]
            scale = block.abs().max().clamp(min=1e-4) / 448
            out[row : row + TILE, column : column + TILE] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return out


def in_12_bits(x: Tensor) -> Tensor:
    """E."""
    tiles = functional.pad(x, (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    scale = torch.exp2((tiles.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 65024).log2().ceil())
    scaled = tiles / scale
    step = torch.exp2(torch.frexp(scaled)[1].sub(1).clamp(min=-14).sub(6).float())
    return (torch.round(scaled / step) * step * scale).flatten(-2)[..., : x.shape[-1]]


class NormLinears(torch.autograd.Function):
    """A norm and linear layers in FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        q = quantized(x * inverse * norm)
        ctx.save_for_backward(q, inverse, norm, *weights)
        return tuple(q @ blocks(w).t() for w in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, inverse, norm, *weights = ctx.saved_tensors
        g = sum(quantized(grad, GRADIENT) @ blocks(w) for grad, w in zip(grads, weights, strict=True))
        hat = q / norm
        grad_x = inverse * (g * norm - hat * (g * q).mean(-1, keepdim=True))
        return grad_x, (g * hat).sum(0), None, *(columns(grad, GRADIENT).t() @ columns(q) for grad in grads)


class RowsLinear(torch.autograd.Function):
    """The gate and up of shared or routed experts in FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, is_routed: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.is_routed = is_routed
        return quantized(x, rounds=True) @ blocks(w).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, w) = grads, ctx.saved_tensors
        rows = quantized(x, rounds=True) if ctx.is_routed else x
        return quantized(g, GRADIENT) @ blocks(w), columns(g, GRADIENT).t() @ columns(rows, rounds=True), None


class GatedDown(torch.autograd.Function):
    """silu(gate) * up, maybe weighted, and the down-projection in FP8."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(quantized(torch.cat([gate, up], -1)), down, weight)
        x = functional.silu(gate) * up
        return quantized(x if weight is None else x * weight) @ blocks(down).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (kept, down, weight) = grads, ctx.saved_tensors
        is_routed = weight is not None
        gate, up = (part.clone().requires_grad_() for part in kept.chunk(2, -1))
        sent = quantized(g, GRADIENT, rounds=is_routed)
        grad_x = sent @ blocks(down)
        with torch.enable_grad():
            factor = weight.clone().requires_grad_() if is_routed else torch.ones(len(g), 1, requires_grad=True)
            x = functional.silu(gate) * up * factor
        parts = torch.autograd.grad(x, (gate, up, factor), grad_x)
        side = columns(sent if is_routed else g, GRADIENT, rounds=is_routed)
        return parts[0], parts[1], side.t() @ columns(x.detach()), parts[2] if is_routed else None


class Attend(torch.autograd.Function):
    """Causal attention and its output projection in FP8; BHTV, and rows of all heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> Tensor:
        share = causal_softmax(q @ k.mT * scale)
        rows = (share @ v).transpose(1, 2).flatten(2).flatten(0, 1)
        ctx.save_for_backward(q, k, v, out, share, in_12_bits(rows))
        ctx.scale = scale
        return quantized(rows, rounds=True) @ blocks(out).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (q, k, v, out, share, kept) = grads, ctx.saved_tensors

        def heads(rows: Tensor) -> Tensor:
            return rows.view(len(q), q.shape[2], q.shape[1], -1).transpose(1, 2)

        grad_o = heads(quantized(g, GRADIENT) @ blocks(out))
        grad_share = grad_o @ v.mT - (grad_o * heads(kept)).sum(-1, keepdim=True)
        grad_scores = share * grad_share * ctx.scale
        grad_out = columns(g, GRADIENT).t() @ columns(kept, rounds=True)
        return grad_scores @ k, grad_scores.mT @ q, share.mT @ grad_o, grad_out, None


def causal_softmax(scores: Tensor) -> Tensor:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


class Reader:
    """The model of a golden folder with its optimizer, in one precision."""

    def __init__(self, folder: Path, precision: str, fault: str = "") -> None:
        self.keys: dict[str, Any] = json.loads((folder / "model" / "config.json").read_text())
        groups = json.loads((folder / "settings.json").read_text())
        self.settings: dict[str, Any] = {**groups["optim"], **groups["task"], **groups["ema"]}
        self.batch = load_file(folder / "batch.safetensors")
        self.fault = fault
        self.is_fp8 = precision == "fp8"
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        read = load_file(folder / "model" / "model.safetensors")
        copies = ("2.embed_tokens.weight", "2.shared_head.head.weight")
        named = {name: tensor for name, tensor in read.items() if not name.endswith(copies)}
        self.bias = {name: tensor for name, tensor in named.items() if name.endswith("correction_bias")}
        self.w = {
            name: named[name].to(self.dtype, copy=True).requires_grad_() for name in named.keys() - self.bias.keys()
        }
        self.first = {name: torch.zeros_like(weight) for name, weight in self.w.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in self.w.items()}
        self.average = {name: named[name].clone() for name in self.w}
        self.seen: dict[str, Tensor] = {}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps(name)).rsqrt() * self.w[f"{name}.weight"]

    def eps(self, norm: str) -> float:
        is_latent = norm.endswith("_a_layernorm") and self.fault != "eps of the model in latents"
        eps: float = LATENT_EPS if is_latent else self.keys["rms_norm_eps"]
        return eps

    def norm_linears(self, x: Tensor, norm: str, names: Sequence[str]) -> list[Tensor]:
        weights = [self.w[f"{name}.weight"] for name in names]
        if self.is_fp8:
            return list(NormLinears.apply(x, self.w[f"{norm}.weight"], self.eps(norm), *weights))
        return [self.norm(x, norm) @ w.t() for w in weights]

    def rotate(self, x: Tensor) -> Tensor:
        yarn, size, base = self.keys["rope_scaling"], x.shape[-1], self.keys["rope_theta"]

        def pair(rotations: float) -> float:
            wavelengths = yarn["original_max_position_embeddings"] / (2 * math.pi * rotations)
            return size * math.log(wavelengths) / (2 * math.log(base))

        low, high = max(math.floor(pair(yarn["beta_fast"])), 0), min(math.ceil(pair(yarn["beta_slow"])), size - 1)
        j = torch.arange(size // 2, dtype=self.dtype)
        plain, ramp = base ** (-2 * j / size), ((j - low) / (high - low)).clamp(0, 1)
        angle = torch.arange(x.shape[-2], dtype=self.dtype)[:, None] * (
            plain * (1 - ramp) + plain / yarn["factor"] * ramp
        )
        factor = 1.0 if self.fault == "rotation without its factor" else self.temperature("mscale")
        factor /= 1.0 if self.fault == "rotation without its factor" else self.temperature("mscale_all_dim")
        cos, sin = factor * angle.cos(), factor * angle.sin()
        if self.fault == "rotates halves":
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def temperature(self, key: str) -> float:
        yarn = self.keys["rope_scaling"]
        return 0.1 * yarn[key] * math.log(yarn["factor"]) + 1

    def attention(self, x: Tensor, layer: int, shape: tuple[int, int]) -> Tensor:
        keys, place = self.keys, f"model.layers.{layer}"
        nope, rope, count = keys["qk_nope_head_dim"], keys["qk_rope_head_dim"], keys["num_attention_heads"]
        parts = [f"{place}.self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa")]
        low, both = self.norm_linears(x, f"{place}.input_layernorm", parts)
        latent, shared = both[:, :-rope], both[:, -rope:]
        (q,) = self.norm_linears(low, f"{place}.self_attn.q_a_layernorm", [f"{place}.self_attn.q_b_proj"])
        (up,) = self.norm_linears(latent, f"{place}.self_attn.kv_a_layernorm", [f"{place}.self_attn.kv_b_proj"])
        q, up = (rows.view(*shape, count, -1).transpose(1, 2) for rows in (q, up))
        shared = self.rotate(shared.view(shape[0], 1, shape[1], rope)).expand(-1, count, -1, -1)
        q, k, v = (
            torch.cat([q[..., :nope], self.rotate(q[..., nope:])], -1),
            torch.cat([up[..., :nope], shared], -1),
            up[..., nope:],
        )
        out = self.w[f"{place}.self_attn.o_proj.weight"]
        scale = (nope + rope) ** -0.5 * self.temperature("mscale_all_dim") ** 2
        if self.is_fp8:
            mixed = Attend.apply(q, k, v, out, scale)
        else:
            mixed = (causal_softmax(q @ k.mT * scale) @ v).transpose(1, 2).flatten(2).flatten(0, 1) @ out.t()
        self.seen[f"attention/layers.{layer}"] = (x + mixed).detach().view(*shape, -1)
        return x + mixed

    def gated(self, gate: Tensor, up: Tensor, name: str, weight: Tensor | None = None) -> Tensor:
        down = self.w[f"{name}.down_proj.weight"]
        if self.is_fp8:
            return GatedDown.apply(gate, up, down, weight)
        x = functional.silu(gate) * up
        return (x if weight is None else x * weight) @ down.t()

    def rows_linear(self, x: Tensor, w: Tensor, *, is_routed: bool) -> Tensor:
        return RowsLinear.apply(x, w, is_routed) if self.is_fp8 else x @ w.t()

    def route(self, normal: Tensor, layer: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        keys, name = self.keys, f"model.layers.{layer}.mlp.gate"
        scores = (normal @ self.w[f"{name}.weight"].t()).sigmoid()
        biased = scores.detach() + self.bias[f"{name}.e_score_correction_bias"]
        if self.fault != "ignores groups":
            groups = biased.unflatten(-1, (keys["n_group"], -1))
            count = groups.shape[-1] if self.fault == "sums whole groups" else 2
            best = groups.topk(count, -1).values.sum(-1).topk(keys["topk_group"], -1).indices
            out = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, best, value=False)
            biased = groups.masked_fill(out[..., None], -torch.inf).flatten(-2)
        ids = biased.topk(keys["num_experts_per_tok"], -1).indices.sort(-1).values
        chosen = scores.gather(1, ids)
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        weights = weights if self.fault == "does not scale weights" else weights * keys["routed_scaling_factor"]
        count, size, top = shape[0], scores.shape[1], ids.shape[1]
        plain = functional.one_hot(scores.detach().topk(top, -1).indices, size).sum(1).to(scores).view(*shape, size)
        share = (scores / scores.sum(-1, keepdim=True)).view(*shape, size).mean(1)
        balance = (plain.sum(1) * size / (top * shape[1]) * share).sum() / count
        self.seen |= {
            f"router_scores/layers.{layer}": scores.detach().view(*shape, -1),
            f"router_experts/layers.{layer}": ids.view(*shape, -1),
            f"router_weights/layers.{layer}": weights.detach().view(*shape, -1),
            f"loss/balance/layers.{layer}": balance.detach(),
        }
        self.balances.append(balance)
        return ids, weights

    def layer(self, x: Tensor, layer: int, shape: tuple[int, int]) -> Tensor:
        x = self.attention(x, layer, shape)
        name, norm = f"model.layers.{layer}.mlp", f"model.layers.{layer}.post_attention_layernorm"
        if layer < self.keys["first_k_dense_replace"]:
            gate, up = self.norm_linears(x, norm, [f"{name}.gate_proj", f"{name}.up_proj"])
            return x + self.gated(gate, up, name)
        normal = self.norm(x, norm)
        ids, weights = self.route(normal, layer, shape)
        shared = [self.w[f"{name}.shared_experts.{part}_proj.weight"] for part in ("gate", "up")]
        gate, up = (self.rows_linear(normal, w, is_routed=False) for w in shared)
        out = self.gated(gate, up, f"{name}.shared_experts")
        for expert in range(self.keys["n_routed_experts"]):
            token, choice = torch.where(ids == expert)
            place = f"{name}.experts.{expert}"
            both = torch.cat([self.w[f"{place}.{part}_proj.weight"] for part in ("gate", "up")])
            gate, up = self.rows_linear(normal[token], both, is_routed=True).chunk(2, -1)
            out = out.index_add(0, token, self.gated(gate, up, place, weights[token, choice, None]))
        return x + out

    def loss(self, step: int) -> Tensor:
        """Runs the forward of a step."""
        self.seen, self.balances = {}, list[Tensor]()
        settings, head = self.settings, self.w["lm_head.weight"]
        embedding, count = self.w["model.embed_tokens.weight"], self.keys["num_hidden_layers"]
        inputs, ahead = (self.batch[f"step_{step}/inputs/{depth}"] for depth in ("main", "mtp_1"))
        shape = (len(inputs), inputs.shape[1])
        x = embedding[inputs.flatten()]
        for layer in range(count):
            x = self.layer(x, layer, shape)
        state = self.norm(x, "model.norm")
        place = f"model.layers.{count}"
        parts = [self.norm(embedding[ahead.flatten()], f"{place}.enorm"), self.norm(state, f"{place}.hnorm")]
        later = self.layer(torch.cat(parts, -1) @ self.w[f"{place}.eh_proj.weight"].t(), count, shape)
        means = []
        for depth, normal in (("main", state), ("mtp_1", self.norm(later, f"{place}.shared_head.norm"))):
            targets = self.batch[f"step_{step}/targets/{depth}"]
            nats = functional.cross_entropy(normal @ head.t(), targets.flatten(), reduction="none").view(shape)
            self.seen[f"token_loss/{depth}"] = nats.detach()
            micro = zip(nats.split(2), targets.split(2), strict=True)
            of_parts = torch.stack([part.sum() / (target != NONE).sum() for part, target in micro])
            is_wrong = self.fault == "averages micro-batches"
            means.append(of_parts.mean() if is_wrong else nats.sum() / (targets != NONE).sum())
        balance = torch.stack(self.balances).sum()
        self.seen |= {"loss/main": means[0], "loss/mtp_1": means[1], "loss/balance": balance}
        weight = 1.0 if self.fault == "wrong weight of MTP" else settings["mtp_loss_weight"]
        total = means[0] + weight * means[1]
        if self.fault != "forgets balance":
            balance = balance.detach() if self.fault == "balance without gradient" else balance
            total = total + settings["balance_loss_weight"] * balance
        self.seen["loss/total"] = total
        return total

    def step(self, step: int) -> dict[str, Tensor]:
        """Returns all results of a step."""
        names = list(self.w)
        gradients = dict(zip(names, torch.autograd.grad(self.loss(step), list(self.w.values())), strict=True))
        return self.finish(step, gradients)

    @torch.no_grad()
    def finish(self, step: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates the weights."""
        s = self.settings
        results = {name: value.detach() for name, value in self.seen.items()}
        results |= {f"gradient/{name}": gradient.clone() for name, gradient in gradients.items()}
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt()
        results["gradient_norm"] = norm
        scale = 1.0 if self.fault == "does not clip" else min(1.0, s["clip_norm"] / (float(norm) + 1e-6))
        has_correction = self.fault != "moments without correction"
        for name, weight in self.w.items():
            g, first, second = gradients[name] * scale, self.first[name], self.second[name]
            first.mul_(s["beta1"]).add_((1 - s["beta1"]) * g)
            second.mul_(s["beta2"]).add_((1 - s["beta2"]) * g.square())
            unbiased = first / (1 - s["beta1"] ** step if has_correction else 1)
            root = (second / (1 - s["beta2"] ** step if has_correction else 1)).sqrt()
            is_norm = weight.ndim == 1 and self.fault != "decays norms"
            weight.mul_(1 - s["learning_rate"] * (0.0 if is_norm else s["weight_decay"]))
            weight.sub_(s["learning_rate"] * unbiased / (root + s["eps"]))
            decay = 1 - s["decay"] if self.fault == "swaps the average" else s["decay"]
            self.average[name].mul_(decay).add_((1 - decay) * weight.float())
        sign = -1 if self.fault == "turns the bias" else 1
        for name, bias in self.bias.items():
            chosen = results[f"router_experts/layers.{name.split('.')[2]}"]
            load = chosen.flatten().bincount(minlength=len(bias)).double()
            bias.add_(sign * s["bias_update_rate"] * torch.sign(load.mean() - load).float())
        for kind, named in (("exp_avg", self.first), ("exp_avg_sq", self.second), ("average", self.average)):
            results |= {f"{kind}/{name}": tensor.clone() for name, tensor in named.items()}
        results |= {f"weight/{name}": tensor.detach().clone() for name, tensor in (self.w | self.bias).items()}
        return results


def write(folder: Path, step: int, results: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes the results of a step as a trainer would: losses and norms in the type of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = ("average/", "weight/")

    def typed(name: str, tensor: Tensor) -> Tensor:
        wide = tensor.is_floating_point() and not name.startswith(kept)
        return (tensor.to(dtype) if wide else tensor).contiguous()

    named = {name: typed(name, tensor) for name, tensor in results.items()}
    save_file(named, folder / f"step_{step}.safetensors")

"""Computes the golden step with transformers' DeepSeek-V3, and in plain PyTorch what that lacks.

Those are MTP, the balance loss, the update, and float64. Nothing of this project's sources is imported.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

BIAS = "mlp.gate.e_score_correction_bias"


class Float64Torch:
    """The module `torch` with float64 in place of float32, to which transformers rounds norms, router and softmax."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


class Mtp(nn.Module):
    """The parts of an MTP module besides its layer."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer = modeling.DeepseekV3DecoderLayer(config, layer)
        self.enorm, self.hnorm, self.norm = (modeling.DeepseekV3RMSNorm(size, config.rms_norm_eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * size, size, bias=False)


class TransformersReader:
    """A golden folder's model; its results have the names of the folder."""

    def __init__(self, folder: Path, precision: str, patch: pytest.MonkeyPatch) -> None:
        if precision == "float64":
            patch.setattr(modeling, "torch", Float64Torch())
        self.dtype = getattr(torch, precision)
        groups = json.loads((folder / "settings.json").read_text())
        self.settings: dict[str, Any] = {**groups["optim"], **groups["task"], **groups["ema"]}
        self.batch = load_file(folder / "batch.safetensors")
        path = folder / "model"
        self.model: Any = DeepseekV3ForCausalLM.from_pretrained(
            path, dtype=self.dtype, attn_implementation="eager", experts_implementation="eager"
        )
        config: Any = self.model.config
        self.config = config
        self.place = f"model.layers.{config.num_hidden_layers}."
        self.mtp = Mtp(config, config.num_hidden_layers).to(self.dtype)
        self._load_mtp(load_file(path / "model.safetensors"))
        self.model.model.rotary_emb.inv_freq = self._frequencies()
        self.layers = [*self.model.model.layers, self.mtp.layer]
        self.seen: dict[str, Tensor] = {}
        self.scores: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers):
            self._watch(number, layer)
        parameters = [*self.model.parameters(), *self.mtp.parameters()]
        s = self.settings
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": s["weight_decay"]},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=s["learning_rate"],
            betas=(s["beta1"], s["beta2"]),
            eps=s["eps"],
        )
        self.average = {name: tensor.float().clone() for name, tensor in self.named(torch.Tensor.detach).items()}

    def named(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Returns `of` every parameter under its released name."""
        mtp = {f"{self.place}{name.removeprefix('layer.')}": p for name, p in self.mtp.named_parameters()}
        mtp[f"{self.place}shared_head.norm.weight"] = mtp.pop(f"{self.place}norm.weight")
        result = {}
        for name, parameter in {**dict(self.model.named_parameters()), **mtp}.items():
            tensor, stem = of(parameter), name.rpartition(".")[0]
            for expert in range(len(tensor) if ".experts." in name and "shared" not in name else 0):
                if name.endswith("gate_up_proj"):
                    gate, up = tensor[expert].chunk(2)
                    result[f"{stem}.{expert}.gate_proj.weight"], result[f"{stem}.{expert}.up_proj.weight"] = gate, up
                else:
                    result[f"{stem}.{expert}.down_proj.weight"] = tensor[expert]
            if ".experts." not in name:
                result[name] = tensor
        return {name: tensor.clone().contiguous() for name, tensor in result.items()}

    def _load_mtp(self, stored: dict[str, Tensor]) -> None:
        own = {name.removeprefix(self.place): tensor for name, tensor in stored.items() if name.startswith(self.place)}
        experts = range(self.config.n_routed_experts)

        def stack(*parts: str) -> Tensor:
            rows = [torch.cat([own[f"mlp.experts.{e}.{part}_proj.weight"] for part in parts]) for e in experts]
            return torch.stack(rows)

        outside = ("enorm", "hnorm", "eh_proj")
        state = {name if name.startswith(outside) else f"layer.{name}": tensor for name, tensor in own.items()}
        state["norm.weight"] = own["shared_head.norm.weight"]
        state["layer.mlp.experts.gate_up_proj"] = stack("gate", "up")
        state["layer.mlp.experts.down_proj"] = stack("down")
        self.mtp.load_state_dict({name: state[name] for name in self.mtp.state_dict()})

    def _frequencies(self) -> Tensor:
        """YaRN in the model's type: transformers makes the frequencies in float32."""
        if self.dtype != torch.float64:
            frequencies: Tensor = self.model.model.rotary_emb.inv_freq
            return frequencies
        rope, size = self.config.rope_parameters, self.config.qk_rope_head_dim
        plain = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=self.dtype) / size)
        low, high = (
            size
            * math.log(rope["original_max_position_embeddings"] / (2 * math.pi * rope[beta]))
            / (2 * math.log(rope["rope_theta"]))
            for beta in ("beta_fast", "beta_slow")
        )
        start, end = max(math.floor(low), 0), min(math.ceil(high), size - 1)
        ramp = ((torch.arange(size // 2, dtype=self.dtype) - start) / (end - start)).clamp(0, 1)
        interpolated: Tensor = plain * (1 - ramp) + plain / rope["factor"] * ramp
        return interpolated

    def _watch(self, number: int, layer: Any) -> None:
        residual: list[Tensor] = []
        layer.register_forward_pre_hook(lambda module, args: residual.append(args[0].detach()))

        def attended(module: Any, args: Any, output: Any) -> None:
            self.seen[f"attention/layers.{number}"] = residual.pop() + output[0].detach()

        def routed(module: Any, args: Any, output: Any) -> None:
            logits, weights, ids = output
            self.scores[number] = logits.sigmoid().view(*self.shape, -1)
            ids, order = ids.sort(-1)
            self.seen |= {
                f"router_scores/layers.{number}": self.scores[number].detach(),
                f"router_experts/layers.{number}": ids.view(*self.shape, -1),
                f"router_weights/layers.{number}": weights.detach().gather(-1, order).view(*self.shape, -1),
            }

        layer.self_attn.register_forward_hook(attended)
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(routed)

    def _loss(self, step: int) -> Tensor:
        inputs, ahead = (self.batch[f"step_{step}/inputs/{depth}"] for depth in ("main", "mtp_1"))
        self.shape = inputs.shape
        state = self.model.model(inputs, use_cache=False).last_hidden_state
        mtp, embedded = self.mtp, self.model.model.embed_tokens(ahead)
        merged = mtp.eh_proj(torch.cat([mtp.enorm(embedded), mtp.hnorm(state)], -1))
        positions = torch.arange(inputs.shape[1])[None]
        later = mtp.layer(
            merged,
            attention_mask=torch.full((inputs.shape[1],) * 2, -torch.inf, dtype=self.dtype).triu(1)[None, None],
            position_ids=positions,
            position_embeddings=self.model.model.rotary_emb(merged, positions),
        )
        losses = {}
        for depth, normal in (("main", state), ("mtp_1", mtp.norm(later))):
            targets = self.batch[f"step_{step}/targets/{depth}"]
            nats = functional.cross_entropy(self.model.lm_head(normal).transpose(1, 2), targets, reduction="none")
            self.seen[f"token_loss/{depth}"] = nats.detach()
            losses[depth] = nats.sum() / (targets >= 0).sum()
        balances = {number: self._balance(scores) for number, scores in self.scores.items()}
        self.seen |= {f"loss/balance/layers.{number}": value.detach() for number, value in balances.items()}
        balance, s = torch.stack(list(balances.values())).sum(), self.settings
        total = losses["main"] + s["mtp_loss_weight"] * losses["mtp_1"] + s["balance_loss_weight"] * balance
        named = {**losses, "balance": balance, "total": total}
        self.seen |= {f"loss/{name}": value.detach() for name, value in named.items()}
        return total

    def _balance(self, scores: Tensor) -> Tensor:
        size, top = scores.shape[-1], self.config.num_experts_per_tok
        counts = torch.zeros_like(scores).scatter(-1, scores.topk(top, -1).indices, 1.0).mean(1)
        share = (scores / scores.sum(-1, keepdim=True)).mean(1)
        return (counts.detach() * size / top * share).sum(-1).mean()

    def step(self, step: int) -> dict[str, Tensor]:
        """Runs a step, and returns all results."""
        self._loss(step).backward()
        results = dict(self.seen)
        results |= {f"gradient/{name}": grad for name, grad in self.named(lambda p: p.grad).items()}  # type: ignore[arg-type, return-value]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        results["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, self.settings["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = self.named(lambda p, kind=kind: self.optimizer.state[p][kind])  # type: ignore[misc]
            results |= {f"{kind}/{name}": tensor for name, tensor in moments.items()}
        weights = self.named(torch.Tensor.detach)
        for name, weight in weights.items():
            self.average[name].lerp_(weight.float(), 1 - self.settings["decay"])
        results |= {f"weight/{name}": tensor for name, tensor in weights.items()}
        results |= {f"average/{name}": tensor.clone() for name, tensor in self.average.items()}
        for number in self.scores:
            bias = self.layers[number].mlp.gate.e_score_correction_bias
            load = results[f"router_experts/layers.{number}"].flatten().bincount(minlength=len(bias)).double()
            bias.add_(self.settings["bias_update_rate"] * torch.sign(load.mean() - load).to(bias.dtype))
            results[f"weight/model.layers.{number}.{BIAS}"] = bias.float()
        return results

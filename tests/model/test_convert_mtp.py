"""MTP modules of a checkpoint against the formula, written out on released names.

Source: arXiv:2412.19437, section 2.2. Shape legend: B sequences, T tokens, D hidden size, V vocabulary.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM

from model.hf.convert import load_hf
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from tests.model.hf_checkpoints import mtp_tensors, random_tokens, read_tensors, reference_model, write_tensors

IGNORED = -100


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def mtp_by_hand(
    reference: DeepseekV3ForCausalLM, tensors: dict[str, Tensor], tokens_BT: Tensor, depth: int
) -> list[tuple[Tensor, Tensor]]:
    """Returns for each depth the head's input (BTD) and logits (BTV); the block is a layer of transformers."""
    layers = reference.config.num_hidden_layers
    length = tokens_BT.shape[1] - depth
    with torch.no_grad():
        hidden_BTD = reference.model(tokens_BT).last_hidden_state[:, :length]
    made = []
    for number in range(depth):
        prefix = f"model.layers.{layers + number}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        ahead_BT = tokens_BT[:, number + 1 : number + 1 + length]
        embedded_BTD = functional.embedding(ahead_BT, own["embed_tokens.weight"])
        both = torch.cat((norm(embedded_BTD, own["enorm.weight"]), norm(hidden_BTD, own["hnorm.weight"])), -1)
        block_output_BTD = run_block(reference, own, both @ own["eh_proj.weight"].T)
        hidden_BTD = norm(block_output_BTD, own["shared_head.norm.weight"])
        made.append((hidden_BTD, hidden_BTD @ own["shared_head.head.weight"].T))
    return made


@torch.no_grad()
def run_block(reference: DeepseekV3ForCausalLM, own: dict[str, Tensor], x_BTD: Tensor) -> Tensor:
    """Runs the last layer of transformers' model with other weights; its experts are stacked, gate rows first."""
    layer: nn.Module = reference.model.layers[-1]
    experts = [name for name in own if name.startswith("mlp.experts.")]
    number = 1 + max(int(name.split(".")[2]) for name in experts)
    state = {name: tensor for name, tensor in own.items() if name not in experts and name in layer.state_dict()}
    state["mlp.experts.gate_up_proj"] = torch.stack(
        [
            torch.cat([own[f"mlp.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up")])
            for expert in range(number)
        ]
    )
    state["mlp.experts.down_proj"] = torch.stack(
        [own[f"mlp.experts.{expert}.down_proj.weight"] for expert in range(number)]
    )
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    positions = torch.arange(x_BTD.shape[1])[None]
    mask = torch.full((x_BTD.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    rotation = reference.model.rotary_emb(x_BTD, positions)
    out: Tensor = layer(x_BTD, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
    layer.load_state_dict(saved)
    return out


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_logits_equal_the_formula_by_hand(depth: int, tmp_path: Path) -> None:
    """Compares position by position.

    The loss of one target, and in the head's gradient the probability of every token, must be equal.
    """
    reference = reference_model(num_nextn_predict_layers=depth)
    reference.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path) | mtp_tensors(tmp_path, depth)
    write_tensors(tmp_path, tensors, num_files=3)
    model = load_hf(tmp_path, torch.float32)
    assert model.config.mtp_depth == depth
    tokens_BT = random_tokens(1, 15)
    length = tokens_BT.shape[1] - depth
    inputs_BT = tuple(tokens_BT[:, number : number + length] for number in range(depth + 1))
    for number, (hidden_BTD, logits_BTV) in enumerate(mtp_by_hand(reference, tensors, tokens_BT, depth), start=1):
        factors = tuple(float(other == number) for other in range(depth + 1))
        for position in range(length):
            targets = [torch.full((1, length), IGNORED) for _ in range(depth + 1)]
            target = (7 * position + number) % logits_BTV.shape[-1]
            targets[number][0, position] = target
            loss = model.loss(
                MicroBatch(inputs_BT=inputs_BT, targets_BT=tuple(targets)),
                CrossEntropy(factors=factors, balance=0.0),
                LossSums(loss_names(depth)),
            )
            expected_V = logits_BTV[0, position].log_softmax(-1)
            assert loss.item() == pytest.approx(-expected_V[target].item(), abs=1e-4)
            (made_VD,) = torch.autograd.grad(loss, [model.head_weight])
            error_V = expected_V.exp() - functional.one_hot(torch.tensor(target), len(expected_V))
            torch.testing.assert_close(
                made_VD, error_V[:, None] * hidden_BTD[0, position].float(), rtol=1e-4, atol=1e-4
            )

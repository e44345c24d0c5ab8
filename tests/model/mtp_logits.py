"""Logits of MTP modules, computed from the parts of a model in the order of the formula."""

from torch import Tensor
from torch.nn import functional

from model.block import run_block
from model.linear import widen
from model.transformer import Transformer


def mtp_logits(model: Transformer, tokens_BT: Tensor) -> list[Tensor]:
    """Returns each module's logits, B(T-k)V: module k at position i predicts token i + k + 1."""
    config, hidden, logits = model.config, model.embed(tokens_BT, None), list[Tensor]()
    for depth in range(config.mtp_depth + 1):
        layers = range(config.num_layers)
        if depth:
            hidden = model.mtp_block(depth).merge(model.embed(tokens_BT[:, depth:], None), hidden[:, :-1], None)
            layers = range(config.num_layers + depth - 1, config.num_layers + depth)
        for layer in layers:
            hidden, _ = run_block(model.block(layer), model.dispatcher, hidden, None)
        normal = model.final_norm(depth)(hidden)
        if depth:
            logits.append(widen(functional.linear(normal, model.head_weight)))
        if config.mtp_hidden == "post_norm":
            hidden = normal
    return logits

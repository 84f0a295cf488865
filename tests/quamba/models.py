"""Random models of both families for tests, every parameter random, sizes such that every part matters."""

from __future__ import annotations

import torch

from quamba import QuambaLMHeadModel
from quamba.config import QuambaConfig


def random_model(
    family: str = "mamba2",
    hidden: int = 24,
    inner: int = 48,
    layers: int = 2,
    vocab: int = 64,
    tied: bool = True,
    mlp: int | None = None,
    seed: int = 0,
    **args,
) -> QuambaLMHeadModel:
    torch.manual_seed(seed)
    if family == "mamba1":
        shape = {"intermediate_size": inner, "state_size": 8, "time_step_rank": 3} | args
    else:
        width = args.pop("head_dim", inner // 8)
        shape = {
            "num_heads": inner // width,
            "head_dim": width,
            "state_size": 8,
            "n_groups": 1,
            "norm_groups": 1,
        } | args
    block = {"mixer": family, "args": shape, "mlp": None if mlp is None else {"intermediate_size": mlp}}
    config = QuambaConfig(vocab_size=vocab, hidden_size=hidden, blocks=[block] * layers, tie_word_embeddings=tied)
    model = QuambaLMHeadModel(config).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(50)
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith(("bias", ".D")):
                p.add_(torch.randn_like(p) * 0.3)
    return model

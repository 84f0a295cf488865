"""Tiny models to generate with, and what it means that two runs agree."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

import quamba
from quamba import QuambaLMHeadModel
from quamba.config import QuambaConfig

SHAPES = {
    "mamba1": {"intermediate_size": 48, "state_size": 8, "conv_kernel": 4, "time_step_rank": 3},
    "mamba2": {"num_heads": 6, "head_dim": 8, "state_size": 8, "n_groups": 2, "norm_groups": 2, "chunk_size": 4},
}


def free_running():
    """Nothing that stops or forbids anything."""
    return GenerationConfig(eos_token_id=None, pad_token_id=0)


def tiny(vocab, seed=0, mixer="mamba1"):
    """A model whose text wanders: a large tied embedding would write the last token again and again, whatever its state."""
    torch.manual_seed(seed)
    block = {"mixer": mixer, "args": SHAPES[mixer], "mlp": None}
    config = QuambaConfig(vocab_size=vocab, hidden_size=24, blocks=[block] * 2, tie_word_embeddings=False)
    model = QuambaLMHeadModel(config).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(5)
        model.lm_head.weight.normal_()
    model.generation_config = free_running()
    return model


def random_ids(vocab, length, batch=1, seed=3):
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


THREE = ("mamba1", "mamba1 w8a8", "mamba2")


def three_models():
    """One of each of THREE."""
    model = tiny(50)
    w8a8 = quamba.quantize(model, "w8a8", calibration=random_ids(50, 32, 16))
    return dict(zip(THREE, (model, w8a8, tiny(50, seed=7, mixer="mamba2")), strict=True))


def run(model, ids, **options):
    """Sequences and scores, from one state of torch's random numbers."""
    torch.manual_seed(11)
    return model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)


def agree(a, b, most):
    """Tokens `[N, T]` and scores `[T, N, V]` of two ways to write a text. Scores differ by at most `most`; a token differs
    only where the best two are so near that this difference can turn them, and what follows it is another text."""
    compared = 0
    (tokens, scores), (others, other_scores) = a, b
    for row in range(len(tokens)):
        for t in range(tokens.shape[1]):
            x, y = scores[t, row], other_scores[t, row]
            finite = torch.isfinite(x)
            assert torch.equal(finite, torch.isfinite(y))
            difference = float((x - y)[finite].abs().max())
            assert difference <= most
            compared += 1
            if tokens[row, t] != others[row, t]:
                first, second = x.topk(2).values
                assert first - second <= 2 * difference
                break
    assert compared > 0.5 * tokens.numel()

"""Folding, rotating and reordering change the weights and not the function: float logits before and after."""

import pytest
import torch

import quamba
from quamba.errors import RecipeError
from quamba.plan import Rotation
from quamba.recipe import Recipe
from tests.quamba.models import random_model

EVERYTHING = {"fold_norm": True, "rotate": ("out_proj",), "rotate_residual": True}


def transformed(model, ids, **changes):
    """The model after the transforms of a recipe that quantizes nothing."""
    family = model.config.blocks[0]["mixer"]
    recipe = Recipe("nothing", family, **(EVERYTHING | changes))
    return quamba.quantize(model, recipe, calibration=ids)


def token_ids(vocab=64, seed=3):
    return torch.randint(0, vocab, (3, 20), generator=torch.Generator().manual_seed(seed))


def assert_same_function(model, other, ids):
    expected, got = model(ids).logits, other(ids).logits
    assert expected.std() > 0.05
    assert (got - expected).abs().max() < 1e-3 * expected.std()
    changed = dict(model.named_parameters())["backbone.layers.0.mixer.in_proj.weight"]
    assert not torch.allclose(changed, other.backbone.layers[0].mixer.in_proj.weight, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("mamba1", {}),
        ("mamba2", {}),
        ("mamba2", {"mlp": 40}),
        ("mamba2", {"n_groups": 8, "norm_groups": 8, "inner": 64}),
        ("mamba2", {"hidden": 30, "inner": 60, "head_dim": 6}),  # 30 = 15 * 2: no matrix of order 15 is known
        ("mamba2", {"use_bias": True, "rms_norm": False, "D_has_hdim": True}),
        ("mamba1", {"use_bias": True, "hidden": 32, "inner": 40}),
    ],
    ids=str,
)
def test_folding_and_rotating_preserve_the_function(family, shape, tied):
    model, ids = random_model(family, tied=tied, **shape), token_ids()
    rotate = ("out_proj", "fc2") if "mlp" in shape else ("out_proj",)
    other = transformed(model, ids, rotate=rotate)
    assert_same_function(model, other, ids)
    assert other.config.tie_word_embeddings == tied
    same_matrix = other.lm_head.weight.data_ptr() == other.backbone.embedding.weight.data_ptr()
    assert same_matrix == tied
    if tied:  # stored as it was
        assert torch.equal(other.backbone.embedding.weight, model.backbone.embedding.weight)


@pytest.mark.parametrize(
    ("hidden", "inner", "matrix"),
    [(768, 1536, "paley12"), (2560, 5120, "paley20"), (2816, 2816, "paley44"), (1792, 1792, "paley28")],
)
def test_widths_of_real_models(hidden, inner, matrix):
    """768 = 12 * 64, 2560 = 20 * 128, 5120 = 20 * 256, 2816 = 44 * 64, 1792 = 28 * 64."""
    model = random_model(hidden=hidden, inner=inner, layers=1, vocab=16, head_dim=64, tied=hidden != 2816)
    ids = token_ids(16)[:1, :6]
    other = transformed(model, ids)
    assert_same_function(model, other, ids)
    plan = other.config.plan
    assert plan.hadamard == Rotation(hidden, int(matrix.removeprefix("paley")), matrix)
    assert plan.blocks[0].rotations["out_proj"].matrix in ("paley12", matrix)


def test_untying_stores_the_embedding_twice():
    model, ids = random_model("mamba1"), token_ids()
    other = transformed(model, ids, untie=True)
    assert_same_function(model, other, ids)
    assert not other.config.tie_word_embeddings
    assert not torch.allclose(other.lm_head.weight, other.backbone.embedding.weight)
    assert torch.equal(other.backbone.norm_f.weight, torch.ones(24))


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_reordering_preserves_the_function(groups, tied):
    """Also with scales by group at sites that stay float: nothing is rounded."""
    model = random_model(n_groups=groups, norm_groups=groups, inner=groups * 4 * 8, head_dim=8, tied=tied)
    ids = token_ids()
    other = transformed(model, ids, reorder=True)
    assert_same_function(model, other, ids)
    before, after = (m.backbone.layers[0].mixer.A_log for m in (model, other))
    assert torch.equal(before.sort().values, after.sort().values)


def test_a_rotated_stream_needs_folded_norms():
    with pytest.raises(RecipeError, match="rotate_residual needs fold_norm"):
        Recipe("x", "mamba1", rotate_residual=True, fold_norm=False)


def test_generation_from_a_turned_stream_equals_the_whole_pass():
    model, ids = random_model("mamba2", hidden=36), token_ids()
    other = transformed(model, ids)
    whole, state = other(ids).logits, other.new_state()
    steps = [other(ids[:, t : t + 1], past_key_values=state).logits for t in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)

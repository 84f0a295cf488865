"""Batches: padding on the left is as if it weren't there, padding on the right is refused, and tokens decide nothing."""

import pytest
import torch

from quamba.generation import left_pad
from tests.quamba.generating import THREE, free_running, random_ids, three_models

ROWS = [random_ids(50, n, seed=n)[0] for n in (3, 8, 5)]


@pytest.fixture(scope="module")
def models():
    return three_models()


@pytest.fixture(params=THREE)
def model(request, models):
    found = models[request.param]
    found.generation_config = free_running()
    return found


def alone(model, row, **options):
    """What follows one row without padding."""
    return model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)[0, len(row) :].tolist()


@pytest.mark.parametrize("mode", ["recurrent", "parallel"])
@pytest.mark.parametrize("beams", [1, 3])
def test_every_row_equals_the_row_alone(model, mode, beams):
    ids, mask = left_pad(ROWS)
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 9, "mode": mode}
    out = model.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(ROWS):
        assert out[i, 8:].tolist() == alone(model, row, **options)


@pytest.mark.parametrize("beams", [1, 2])
def test_what_stands_in_the_padding_does_not_matter(model, beams):
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 6}
    ids, mask = left_pad(ROWS)
    expected = model.generate(ids, attention_mask=mask, **options)[:, 8:]
    for pad in (1, 49):
        found = model.generate(left_pad(ROWS, pad)[0], attention_mask=mask, **options)[:, 8:]
        assert torch.equal(found, expected)
    chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=3, **options)[:, 8:]
    assert torch.equal(chunked, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_end_one_by_one(model, beams):
    """With pad == eos: an end inside a prompt is text, one that is written ends its row alone."""
    free = {"do_sample": False, "num_beams": beams, "max_new_tokens": 9}
    eos = alone(model, ROWS[1], **free)[4]
    options = free | {"eos_token_id": eos, "pad_token_id": eos}
    rows = [torch.cat([torch.tensor([eos]), ROWS[0]]), ROWS[1], torch.cat([ROWS[2], torch.tensor([eos])])]
    ids, mask = left_pad(rows, pad=eos)
    assert mask.sum(1).tolist() == [4, 8, 6]
    out = model.generate(ids, attention_mask=mask, **options)[:, 8:].tolist()
    lengths = set()
    for found, row in zip(out, rows, strict=True):
        expected = alone(model, row, **options)
        lengths.add(len(expected))
        assert found[: len(expected)] == expected
        assert set(found[len(expected) :]) <= {eos}
    assert beams > 1 or len(lengths) > 1  # beams would rather go on
    hidden = mask.clone()
    hidden[0, 4] = 0  # the end that the first row begins with
    read, unread = (model(ids, attention_mask=m).logits[0, -1] for m in (mask, hidden))
    assert (read - unread).abs().max() > 0.01


def test_a_prompt_without_a_mask_is_all_text(model):
    """Where pad is eos, transformers can't tell padding from text, and takes all for text."""
    row = torch.tensor([7, 3, 7, 7, 20])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 7, "pad_token_id": 7, "min_new_tokens": 6}
    assert model.generate(row[None], **options)[0, 5:].tolist() == alone(model, row, **options)


@pytest.mark.parametrize("mode", ["recurrent", "parallel"])
@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ([[1, 1, 1, 0, 0]], r"row 0 of the attention mask ends in padding.*pad on the left.*padding_side"),
        ([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], r"row 1 of the attention mask ends in padding"),
        ([[1, 0, 1, 1, 1]], r"row 0 of the attention mask has zeros after a real token"),
        ([[0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], r"row 1 of the attention mask has no real token"),
    ],
)
def test_masks_that_are_refused(model, mode, mask, why):
    ids = random_ids(50, 5, batch=len(mask))
    with pytest.raises(ValueError, match=why):
        model.generate(ids, attention_mask=torch.tensor(mask), max_new_tokens=1, mode=mode)


def test_a_mask_that_transformers_guesses_is_refused_where_it_is_wrong(model):
    with pytest.raises(ValueError, match="transformers took every pad_token_id for padding: give one"):
        model.generate(torch.tensor([[4, 0, 6, 7]]), max_new_tokens=1)
    assert model.generate(torch.tensor([[4, 0, 6, 7]]), attention_mask=torch.ones(1, 4), max_new_tokens=1).shape == (
        1,
        5,
    )


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_a_prompt_without_a_token_is_refused(model, name):
    with pytest.raises(ValueError, match=r"the prompt has shape \[2, 0\], no token"):
        model.generate(**{name: torch.zeros(2, 0, dtype=torch.int64)}, max_new_tokens=1)

"""Rows of a table against the reference: the same bits."""

import pytest
import torch

from quamba_kernels import reference, triton
from tests.kernels.agreement import codes, normal


@pytest.mark.parametrize("width", [1, 33, 768, 1100])
def test_int8(rng, width):
    table, scale = codes(rng, 50, width), torch.rand(50, generator=rng)
    for ids in (
        torch.tensor(49),
        torch.tensor([[0, 49, 7], [7, 7, 1]]),
        torch.arange(17, dtype=torch.int32),
        torch.empty(0, 2).long(),
    ):
        got = triton.embedding(ids, table, scale)
        assert torch.equal(got, reference.embedding(ids, table, scale)) and got.shape == (*ids.shape, width)


@pytest.mark.parametrize("kind", [torch.int8, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("width", [1, 100, 768])
def test_int4(rng, width, group, kind):
    q = torch.randint(-8, 8, (50, width), generator=rng, dtype=torch.int8)
    packed, scale, groups = reference.pack_int4(q, group), torch.rand(50, generator=rng), -(-width // group)
    g = (
        torch.randint(-15, 16, (50, groups), generator=rng, dtype=torch.int8)
        if kind == torch.int8
        else normal(rng, 50, groups).half()
    )
    ids = torch.randint(0, 50, (3, 11), generator=rng)
    assert torch.equal(
        triton.embedding(ids, packed, scale, g, width), reference.embedding(ids, packed, scale, g, width)
    )


def test_ids_outside_of_the_table_give_nan(rng):
    table, scale = codes(rng, 5, 7), torch.rand(5, generator=rng)
    got = triton.embedding(torch.tensor([0, 5, -1, 4]), table, scale)
    assert got[1:3].isnan().all() and torch.equal(got[[0, 3]], reference.embedding(torch.tensor([0, 4]), table, scale))


def test_floats_are_copied(rng):
    table = normal(rng, 6, 9).bfloat16()
    assert torch.equal(triton.embedding(torch.tensor([3, 0]), table), table[[3, 0]])

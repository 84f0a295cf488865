"""Rows of a table: the same bits as products in float32."""

import pytest
import torch

from quamba_kernels import triton
from tests.gpu import truth
from tests.gpu.cases import DEVICE, FLOATS, GROUPS, large, same_bits, stable

pytestmark = pytest.mark.gpu

SIZES = [(50, 1), (50, 33), (7, 1100), *large((50280, 2560), (256000, 4096))]  # rows and width of the table


def ids_of(rng, entries):
    """Tensors of ids in every form that a model may give, the last row of the table among them."""
    ids = rng.integers(0, entries - 1, 3, 11, dtype=torch.int64)
    ids[0, 0] = entries - 1
    return ids, ids[0, 0], ids[:, ::2], ids.int(), ids[:0]


@pytest.mark.parametrize(("entries", "width"), SIZES)
def test_int8(rng, entries, width):
    table, scale = rng.codes(entries, width), rng.uniform(entries)
    for ids in ids_of(rng, entries):
        got = stable(lambda ids=ids: triton.embedding(ids, table, scale))
        assert same_bits(got, table[ids.long()].float() * scale[ids.long()].unsqueeze(-1))


@pytest.mark.parametrize(("group", "kind"), GROUPS)
@pytest.mark.parametrize(("entries", "width"), SIZES)
def test_int4(rng, entries, width, group, kind):
    packed, group_scale, scale = rng.int4(entries, width, group, kind)
    ids, *_ = ids_of(rng, entries)
    got = stable(lambda: triton.embedding(ids, packed, scale, group_scale, width))
    rows = truth.int4(packed[ids.flatten()], group_scale[ids.flatten()], width)  # exact in float32, too
    assert same_bits(got, rows.float().view(*ids.shape, width) * scale[ids].unsqueeze(-1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(rng, dtype):
    table = rng.normal(40, 33, dtype=dtype)
    for ids in ids_of(rng, 40):
        assert same_bits(triton.embedding(ids, table), table[ids.long()])


def test_ids_outside_of_the_table_give_nan(rng):
    table, scale = rng.codes(5, 7), rng.uniform(5)
    got = triton.embedding(torch.tensor([0, 5, -1, 4], device=DEVICE), table, scale)
    assert bool(got[1:3].isnan().all()) and bool(torch.isfinite(got[[0, 3]]).all())

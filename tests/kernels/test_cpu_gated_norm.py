"""Mamba2's gated norm in C++ against the reference, for every variant this machine runs."""

import pytest
import torch

from quamba_kernels import cpu, reference
from tests.kernels.agreement import close, codes, normal, on_threads

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.why_not()}"),
    pytest.mark.usefixtures("variant", "poisoned"),
]


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 1, 1536), 1), ((2, 3, 66), 2), ((5, 36), 4), ((70, 64), 1), ((3, 7), 7)]
)
def test_gated_norm(rng, shape, groups, norm_before_gate):
    width = shape[-1]
    x, weight = normal(rng, *shape) * 3, normal(rng, width)
    x.view(-1, width)[-1] = 0
    wide = normal(rng, *shape[:-1], 2 * width)
    gates = [(wide[..., width:], None), (wide[..., :width].bfloat16(), None)]
    gates += [(codes(rng, *shape), s) for s in (torch.tensor(0.03), torch.rand(width, generator=rng) / 20)]
    for z, scale in gates:
        run = lambda z=z, s=scale: cpu.gated_rms_norm(x, z, weight, 1e-5, groups, norm_before_gate, z_scale=s)  # noqa: E731
        close(on_threads(run), reference.gated_rms_norm(x, z, weight, 1e-5, groups, norm_before_gate, z_scale=scale))
    half = cpu.gated_rms_norm(x, x, weight.half(), 1e-5, groups, norm_before_gate)
    close(half, reference.gated_rms_norm(x, x, weight.half(), 1e-5, groups, norm_before_gate), 2**-10)


def test_gated_norm_without_rows(rng):
    assert cpu.gated_rms_norm(torch.zeros(0, 8), torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)


def test_variants_give_the_same_bits(rng):
    x, z = normal(rng, 3, 300), codes(rng, 3, 300)

    def everything():
        return [cpu.gated_rms_norm(x, z, torch.ones(300), 1e-5, g, z_scale=torch.tensor(0.1)) for g in (1, 3)]

    here = everything()
    with cpu.force_variant("portable"):
        assert all(torch.equal(a, b) for a, b in zip(here, everything(), strict=True))

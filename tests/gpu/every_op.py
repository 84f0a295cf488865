"""Every op once or twice, and recorded tokens, on sizes that fill no tile: `python -m tests.gpu.every_op`, for tools that watch
a process."""

import torch

import quamba_kernels as kernels
from quamba_kernels import reference, triton
from quamba_kernels.hadamard_matrices import outer_matrix

DEVICE = torch.device("cpu" if triton.interpreting() else "cuda")


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def products() -> None:
    for rows, inputs, outputs in ((1, 333, 131), (19, 130, 70), (130, 257, 300)):
        x, w, s, bias = codes(rows, inputs), codes(outputs, inputs), floats(outputs), floats(outputs)
        token = floats(rows, 1)
        triton.int8_matmul(x, w)
        triton.linear(floats(rows, inputs).half(), floats(outputs, inputs).half(), bias)
        triton.w8a8_linear(x, token, w, s, bias)
        triton.w8_linear(floats(rows, inputs).half(), w, s, None, bias)
        q = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device=DEVICE)
        for group in (32, 128):
            packed, g = reference.pack_int4(q, group), codes(outputs, -(-inputs // group)) // 9
            triton.w4a8_linear(x, token, packed, g, s, bias, s)
            triton.w4_linear(floats(rows, inputs).bfloat16(), packed, g.half(), s)
            triton.embedding(torch.tensor([0, outputs - 1], device=DEVICE), packed, s, g, inputs)
        triton.embedding(torch.tensor([[outputs - 1]], device=DEVICE), w, s)


def rows() -> None:
    for shape in ((1, 33), (7, 1500)):
        x, w = floats(*shape), floats(shape[1])
        triton.quantize(x, w)
        triton.quantize_per_token(x.half())
        triton.rms_norm(x, w.half(), 1e-5)
        triton.rms_norm_per_token(x, w, 1e-5)
        triton.gated_rms_norm(x, codes(*shape), w, 1e-5, 3, z_scale=w)
        triton.gate(x, codes(*shape), z_scale=w)
    for width, name in ((96, "paley12"), (1280, "paley20"), (512, None)):
        outer = None if name is None else outer_matrix(name).to(DEVICE)
        triton.hadamard(floats(3, width), outer, 1, floats(width))
        triton.hadamard_per_token(floats(5, width).half(), outer)


def sequences() -> None:
    for batch, length in ((2, 1), (1, 70), (3, 200)):
        mask = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
        mask[-1, : length // 2] = False
        x, w, s, state = codes(batch, length, 70), codes(70, 4), floats(70), codes(batch, 70, 3)
        triton.causal_conv1d(x, w, s, state=state, mask=mask, x_scale=s, weight_scale=s, inv=s)
        triton.causal_conv1d(floats(batch, length, 70), floats(70, 4), state=floats(batch, 70, 3))
        u, N = floats(batch, length, 70), 20
        inputs = (u, u, -floats(70, N).exp(), u[..., :N], u[..., N : 2 * N], s, u, s)
        triton.selective_scan(*inputs, state=floats(batch, 70, N), mask=mask)
        triton.selective_scan(*inputs, state=codes(batch, 70, N), state_scale=floats(batch, 70))
        heads = codes(batch, length, 4, 33)
        B, dt, per_head = floats(batch, length, 2, N), floats(batch, length, 4), floats(4)
        inputs = (heads, dt, -per_head.exp(), B, B, per_head, per_head)
        triton.ssd_scan(*inputs, state=floats(batch, 4, 33, N), mask=mask, x_scale=floats(132))
        triton.ssd_scan(*inputs, state=floats(batch, 4, 33, N).half(), x_scale=floats(132))
        triton.ssd_scan(*inputs, state=codes(batch, 4, 33, N), state_scale=floats(batch, 4, 33), x_scale=floats(132))


def tokens() -> None:
    """Kernels that do the work of several; each runs when the recording is made, before its graph is."""
    from tests.gpu.test_recording import FORMATS, SHAPES, Case, tensors

    for family in SHAPES:
        for format in FORMATS:
            case = Case(family, format, "float32", 3, 1)
            states = case.states()
            kernels.record(lambda case=case, states=states: case.model(case.ids, states), [case.ids], tensors(states))


if __name__ == "__main__":
    products()
    rows()
    sequences()
    with kernels.backend("triton"), torch.no_grad():
        tokens()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("every op ran")

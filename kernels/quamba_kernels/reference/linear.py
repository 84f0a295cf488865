"""Linear layers: float, weight-only int8, and int8 times int8 with exact accumulators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba_kernels.reference.rounding import finish

# 1024 products of at most 128 * 128 sum to at most 2^24, where float32 still holds every integer: the float product
# is exact on every machine, in any order of summation, also in TF32 or with bfloat16 inputs. torch's own int8 products
# are not an option: on CPUs without VNNI some of them saturate at int16 without a word.
EXACT_INPUTS = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    if weight.device.type == "cpu" and weight.dtype != torch.float32 and rows > 4:
        # Half precision products on a CPU without half precision units are several times slower than float32.
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), bias).to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    acc = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for k in range(0, x.shape[1], EXACT_INPUTS):
        xs, ws = x[:, k : k + EXACT_INPUTS].float(), weight[:, k : k + EXACT_INPUTS].float()
        acc += (xs @ ws.T).to(torch.int32)
    return acc


def w8a8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    acc = int8_matmul(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    y = (acc.float() * weight_scale) * x_scale
    return finish(y if bias is None else y + bias, inv)


def w8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, inv: Tensor | None = None
) -> Tensor:
    y = (x.float() @ weight.float().T) * weight_scale
    return finish(y if bias is None else y + bias, inv)

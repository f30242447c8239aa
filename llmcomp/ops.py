"""The operators of the `llmcomp::` namespace: what passes recognize and kernels compute.

Each is a `torch.library` custom operator with a schema, a fake (shape) function and an eager reference, so
a graph can be executed after any pass. The references compute in float32 inside and round once, as the
kernels do; float64 stays float64. Results of rms_norm, rope and gated lie in memory as those of elementwise
operators do, in the order of the first argument; other results are contiguous where nothing else is said.
Importing this module registers the operators: torch keeps them in one table per process, and a graph can
name an operator only when it is in there.

Letters in shapes: B batch, H heads, S sequence, D channels of a head, N and K outputs and inputs of a
linear layer.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
"""What `gated` may apply to its gate."""


def laid_out_like(x: Tensor, value: Tensor) -> Tensor:
    """`value` in memory as elementwise operators on `x` leave their results."""
    return torch.empty_like(x, dtype=value.dtype).copy_(value)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operator on `dtype` computes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (N, K) of any float dtype, plus bias (N,): (..., N), contiguous, dtype of x.

    Computed in float32 (float64 where x is) and rounded once.
    """
    inside = wide(x.dtype)
    product = F.linear(x.to(inside), weight.to(inside), None if bias is None else bias.to(inside))
    return product.to(x.dtype).contiguous()


@custom_op("llmcomp::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, kn: bool) -> Tensor:
    """x (..., K) times weight (N, K), or (K, N) where `kn`, plus bias (N,): (..., N), contiguous, dtype of x.

    The product is accumulated in float32.
    """
    if not kn:
        return F.linear(x, weight, bias).contiguous()
    rows = x.reshape(-1, weight.shape[0])
    out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return out.reshape(*x.shape[:-1], weight.shape[1])


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kn: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if kn else 0])


@custom_op("llmcomp::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, kn: bool) -> Tensor:
    """Rows x (T, K) sorted by expert, times weight (E, N, K), or (E, K, N) where `kn`: (T, N).

    Expert e has the rows from ends[e - 1] (0 for the first) to ends[e]. Rows beyond the last end give zeros.
    """
    out = x.new_zeros(x.shape[0], weight.shape[2 if kn else 1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        matrix = weight[expert] if kn else weight[expert].t()
        out[start:end] = x[start:end] @ matrix
        start = end
    return out


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, kn: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if kn else 1])


@custom_op("llmcomp::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    offset: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of q (B, Hq, Sq, D) over k (B, Hkv, Skv, D) and v (B, Hkv, Skv, Dv): (B, Hq, Sq, Dv).

    Query head h reads head h // (Hq // Hkv). Scores are scale * q.k, then softcap * tanh(score / softcap)
    where `softcap` > 0. `mask` is broadcastable to (B, Hq, Sq, Skv): bool (True is visible) or float
    (added). Query i stands at position offset + i and sees key j where, with `causal`, j <= offset + i, and
    with `window` > 0, j > offset + i - window (and j < offset + i + window if not causal). `sinks` (Hq,) is
    one more logit per head, in the denominator only. Softmax is in float32; a row that sees nothing gives
    zeros. The memory of the result is (B, Sq, Hq, Dv) contiguous: the output projection reads it without a
    copy.
    """
    dtype = wide(q.dtype)
    repeats = q.shape[1] // k.shape[1]
    keys, values = (t.to(dtype).repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = q.to(dtype) @ keys.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(dtype)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    visible = _visible(q.shape[2], k.shape[2], causal, offset, window, q.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        extra = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]].nan_to_num(0.0)
    return (weights @ values).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _visible(queries: int, keys: int, causal: bool, offset: int, window: int, device: torch.device) -> Tensor:
    """The bool mask (Sq, Skv) that `causal` and `window` describe."""
    i = torch.arange(queries, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)[None, :]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible &= j <= i
    if window > 0:
        visible &= j > i - window
    if window > 0 and not causal:
        visible &= j < i + window
    return visible


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    offset: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)


@custom_op("llmcomp::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    plus_one: bool,
    round_first: bool,
    dtype: torch.dtype | None = None,
    count: int = 0,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the result has `dtype`, by default that of x.

    weight (N,) is taken as 1 + weight where `plus_one` (Gemma). The normalized value is rounded to the
    dtype of the result before it is multiplied by the weight where `round_first` (Llama), else only after
    (Gemma, OLMo 2). The mean is over `count` channels where that is given: those that x lacks are zero.
    """
    dtype = dtype or x.dtype
    inside = x.to(wide(x.dtype))
    squares = inside.square()
    mean = squares.sum(-1, keepdim=True) / count if count else squares.mean(-1, keepdim=True)
    out = inside * torch.rsqrt(mean + eps)
    if round_first:
        out = out.to(dtype)
    if weight is not None:
        factor = weight.to(inside.dtype)
        out = out * (1 + factor if plus_one else factor)
    return laid_out_like(x, out.to(dtype))


@rms_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    plus_one: bool,
    round_first: bool,
    dtype: torch.dtype | None = None,
    count: int = 0,
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@custom_op("llmcomp::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; the result has `dtype`, by
    default x's.
    """
    inside, last = x.to(wide(x.dtype)), x.shape[-1:]
    weight, bias = (None if t is None else t.to(inside.dtype) for t in (weight, bias))
    return F.layer_norm(inside, last, weight, bias, eps).to(dtype or x.dtype).contiguous()


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


@custom_op("llmcomp::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Rotary position embedding of x (..., R): x * cos + rotated(x) * sin; `dtype` is by default that of x.

    rotated(x) is cat(-x[R/2:], x[:R/2]); where `interleaved`, channel pairs (2c, 2c + 1) become (-x[2c +
    1], x[2c]). cos and sin are broadcastable to x and as wide as it, in the order of its channels.
    """
    inside = wide(x.dtype)
    wide_x = x.to(inside)
    if interleaved:
        rotated = torch.stack([-wide_x[..., 1::2], wide_x[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = wide_x.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
    out = wide_x * cos.to(inside) + rotated * sin.to(inside)
    return laid_out_like(x, out.to(dtype or x.dtype))


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@custom_op("llmcomp::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, elementwise on tensors of one shape and dtype; ACTIVATIONS names what there
    is.
    """
    inside = wide(gate.dtype)
    return laid_out_like(gate, (ACTIVATIONS[activation](gate.to(inside)) * up.to(inside)).to(gate.dtype))


@gated.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate)


@custom_op("llmcomp::cache_write_", mutates_args=("cache",))
def cache_write_(cache: Tensor, value: Tensor, position: Tensor, dim: int) -> None:
    """Write the slices of `value` along `dim` into `cache` at the indices `position`, in place, as
    index_copy_ does.

    Readers of `cache` that come later in a graph see the new content.
    """
    cache.index_copy_(dim, position, value)


@cache_write_.register_fake
def _(cache: Tensor, value: Tensor, position: Tensor, dim: int) -> None:
    return None


@custom_op("llmcomp::cache_grow", mutates_args=())
def cache_grow(past: Tensor, count: int, dim: int) -> Tensor:
    """A cache that holds `past` and has `count` more slices along `dim`, to be written: zeros here, anything in
    a program.

    The result is laid out with `dim` outermost, so that what follows can be appended without moving it: a
    program does not copy where `past` is such a cache with room behind it (llmcomp/headroom.py).
    """
    shape = [n + count if d == dim else n for d, n in enumerate(past.shape)]
    grown = past.new_empty_strided(shape, outermost(shape, dim)).zero_()
    grown.narrow(dim, 0, past.shape[dim]).copy_(past)
    return grown


@cache_grow.register_fake
def _(past: Tensor, count: int, dim: int) -> Tensor:
    shape = [n + count if d == dim else n for d, n in enumerate(past.shape)]
    return past.new_empty_strided(shape, outermost(shape, dim))


@custom_op("llmcomp::cache_room", mutates_args=())
def cache_room(shape: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cache to be written (zeros here, anything in a program), laid out with `dim` outermost as by cache_grow."""
    return torch.empty_strided(shape, outermost(shape, dim), dtype=dtype, device=device).zero_()


@cache_room.register_fake
def _(shape: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(shape, outermost(shape, dim), dtype=dtype, device=device)


def outermost(shape: Sequence[int], dim: int) -> list[int]:
    """Strides of a tensor whose elements lie slice by slice along `dim`, each slice in row-major order."""
    strides, step = [0] * len(shape), 1
    for d in (*reversed([d for d in range(len(shape)) if d != dim]), dim):
        strides[d], step = step, step * shape[d]
    return strides


OPS = torch.ops.llmcomp
"""The operators as graphs name them: `OPS.linear.default`."""

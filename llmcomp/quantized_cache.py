"""Keys or values that are held as codes and scales, and that look like a tensor of the model's dtype to everybody else.

    grown = torch.cat([past, k], 2)      past is quantized, k is not: quantizes k, and so is `grown`
    past[:, :, :n], past[rows]           crops and reorders work on codes and scales
    past + 1                             everything else works on what they stand for

The unmodified caches of transformers hold such tensors, and unmodified models compute with them. Compiled, a graph
gets the codes and the scales, and its kernels read nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from llmcomp.cache_ops import quantized
from llmcomp.compat import growing, mark_growing

aten = torch.ops.aten
Rule = Callable[..., "QuantizedCacheTensor | None"]


class QuantizedCacheTensor(Tensor):
    """`codes` (..., D) in int8 or float8 and `scale` (..., 1) in float32, as one tensor (..., D) of `dtype`."""

    codes: Tensor
    scale: Tensor
    # What torch.compile understands: no function is replaced before it comes to operators.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> "QuantizedCacheTensor":
        # Contiguous, as what it is dequantized to, wherever the codes lie: a program may move them.
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedCacheTensor({self.codes.dtype}, {self.dequantized()!r})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, Tensor], dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
    ) -> "QuantizedCacheTensor":
        return QuantizedCacheTensor(parts["codes"], parts["scale"], dtype)

    def _is_view(self) -> bool:
        """Never: a crop is a tensor of its own to torch.compile, which would trace the whole cache it is cut of."""
        return False

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _rules().get(func)
        result = None if rule is None else rule(func, *args, **kwargs)
        if result is not None:
            return result
        plain = tree_map(_dequantized, (args, kwargs))
        out = func(*plain[0], **plain[1])
        if func._schema.is_mutable and args and isinstance(args[0], QuantizedCacheTensor):
            return args[0].overwrite(plain[0][0])
        return out

    def dequantized(self) -> Tensor:
        """A plain tensor of what the codes stand for."""
        return torch.ops.llmcomp.cache_dequantize.default(self.codes, self.scale, self.dtype)  # type: ignore[no-any-return]

    def room(self, shape: Sequence[int]) -> "QuantizedCacheTensor":
        """A tensor (..., D) of zeros that holds codes as this one does."""
        return QuantizedCacheTensor(self.codes.new_zeros(shape), self.scale.new_zeros((*shape[:-1], 1)), self.dtype)

    def overwrite(self, value: Tensor) -> "QuantizedCacheTensor":
        """Hold `value` (..., D) from now on, in the same memory."""
        codes, scale = _parts(value, self.codes.dtype)
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        return self._written()

    def _written(self) -> "QuantizedCacheTensor":
        """Count a write into codes and scales, which autograd does for plain tensors: somebody may share them."""
        torch.autograd.graph.increment_version([t for t in (self.codes, self.scale) if not t.is_inference()])
        return self


def cache_tensor(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> QuantizedCacheTensor:
    """The last call of a graph that returns a quantized cache."""
    made = QuantizedCacheTensor(codes, scale, dtype)
    for dim in growing(codes):
        mark_growing(made, dim)
    return made


def _dequantized(value: Any) -> Any:
    return value.dequantized() if isinstance(value, QuantizedCacheTensor) else value


def _parts(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of `dtype` and scales of a tensor that may be quantized already."""
    if isinstance(value, QuantizedCacheTensor) and value.codes.dtype == dtype:
        return value.codes, value.scale
    return quantized(_dequantized(value), dtype)


# ---- what works on codes and scales; a rule returns None where it does not


@cache
def _rules() -> Mapping[object, Rule]:
    each = (aten.detach.default, aten.clone.default, aten.alias.default, aten.contiguous.default)
    return {
        **dict.fromkeys(each, _each),
        **dict.fromkeys((aten.slice.Tensor, aten.index_select.default, aten.select.int), _along),
        aten.roll.default: _roll,
        aten.zero_.default: _zero_,
        aten.cat.default: _cat,
        aten.index.Tensor: _index,
        aten._to_copy.default: _moved,
        aten.copy_.default: _copy_,
        aten.index_copy_.default: _index_copy_,
        aten.index_put_.default: _index_put_,
    }


def _each(func: OpOverload, x: QuantizedCacheTensor, **kwargs: Any) -> QuantizedCacheTensor:
    return QuantizedCacheTensor(func(x.codes, **kwargs), func(x.scale, **kwargs), x.dtype)


def _along(func: OpOverload, x: QuantizedCacheTensor, dim: int = 0, *args: Any) -> QuantizedCacheTensor | None:
    """What takes positions along a dimension that is not the channels."""
    if not isinstance(x, QuantizedCacheTensor) or dim % x.dim() == x.dim() - 1:
        return None
    return QuantizedCacheTensor(func(x.codes, dim, *args), func(x.scale, dim, *args), x.dtype)


def _roll(
    func: OpOverload, x: QuantizedCacheTensor, shifts: Sequence[int], dims: Sequence[int] = ()
) -> QuantizedCacheTensor | None:
    if not dims or any(dim % x.dim() == x.dim() - 1 for dim in dims):
        return None
    return QuantizedCacheTensor(func(x.codes, shifts, dims), func(x.scale, shifts, dims), x.dtype)


def _index(func: OpOverload, x: Tensor, indices: Sequence[Tensor | None]) -> QuantizedCacheTensor | None:
    """Rows by their numbers; a mask is for plain tensors, as it may reach to the channels."""
    if not isinstance(x, QuantizedCacheTensor) or not _takes_rows(x, indices):
        return None
    return QuantizedCacheTensor(func(x.codes, indices), func(x.scale, indices), x.dtype)


def _takes_rows(x: Tensor, indices: Sequence[Tensor | None]) -> bool:
    numbers = all(i is None or i.dtype in (torch.int64, torch.int32) for i in indices)
    return numbers and len(indices) < x.dim()


def _cat(func: OpOverload, parts: Sequence[Tensor], dim: int = 0) -> QuantizedCacheTensor | None:
    first = next(t for t in parts if isinstance(t, QuantizedCacheTensor))
    parts = [t for t in parts if t.dim() > 1 or t.shape[0] != 0]
    if dim % first.dim() == first.dim() - 1 or any(t.dtype != first.dtype for t in parts):
        return None
    codes, scales = zip(*(_parts(t, first.codes.dtype) for t in parts), strict=True)
    return QuantizedCacheTensor(func(codes, dim), func(scales, dim), first.dtype)


def _moved(func: OpOverload, x: QuantizedCacheTensor, **kwargs: Any) -> QuantizedCacheTensor | None:
    """To another device; another dtype is for plain tensors."""
    if kwargs.pop("dtype", None) not in (None, x.dtype):
        return None
    return QuantizedCacheTensor(func(x.codes, **kwargs), func(x.scale, **kwargs), x.dtype)


def _copy_(func: OpOverload, x: Tensor, source: Tensor, non_blocking: bool = False) -> QuantizedCacheTensor | None:
    if not isinstance(x, QuantizedCacheTensor):
        return None
    if source.shape != x.shape:
        source = source.expand(x.shape)
    return x.overwrite(source if source.dtype == x.dtype else source.to(x.dtype))


def _index_copy_(func: OpOverload, x: Tensor, dim: int, index: Tensor, source: Tensor) -> QuantizedCacheTensor | None:
    if not isinstance(x, QuantizedCacheTensor) or dim % x.dim() == x.dim() - 1:
        return None
    codes, scale = _parts(source, x.codes.dtype)
    try:
        func(x.codes, dim, index, codes)
    except NotImplementedError:  # of float8 in eager
        func(x.codes.view(torch.uint8), dim, index, codes.view(torch.uint8))
    func(x.scale, dim, index, scale)
    return x._written()


def _index_put_(
    func: OpOverload, x: Tensor, indices: Sequence[Tensor | None], source: Tensor, accumulate: bool = False
) -> QuantizedCacheTensor | None:
    if not isinstance(x, QuantizedCacheTensor) or not _takes_rows(x, indices) or accumulate:
        return None
    codes, scale = _parts(source if source.dim() else source.reshape(1), x.codes.dtype)
    func(x.codes, indices, codes)
    func(x.scale, indices, scale)
    return x._written()


def _zero_(func: OpOverload, x: QuantizedCacheTensor) -> QuantizedCacheTensor:
    func(x.codes)
    func(x.scale)
    return x._written()

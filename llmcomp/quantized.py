"""A quantized weight: a tensor subclass that owns packed data and takes part in eager code as the float matrix.

    weight = QuantizedTensor.quantize(linear.weight, Int4())      # (N, K), reports the dtype of the float weight
    torch.nn.functional.linear(x, weight)                         # eager: dequantized for the length of the call, or
                                                                  # x quantized too where the format is dynamic
    torch.compile(...)                                            # AOTAutograd hands codes and scales to the backend

There is one store and no second copy to go stale: `state_dict`, `.to()`, `copy.deepcopy` and pickling move the packed
parts (`torch.load` wants `torch.serialization.add_safe_globals(llmcomp.safe_globals())` before), and what is written
(`copy_`, `load_state_dict`, `mul_`) is quantized.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import llmcomp.packed_ops  # noqa: F401  (defines torch.ops.llmcomp.dequantize)
from llmcomp.formats import FORMATS, Format, Packed, grouped, parse_format

aten = torch.ops.aten
PARTS = ("codes", "scale", "zero", "order")


def safe_globals() -> list[type]:
    """What `torch.load` of quantized weights must be allowed to make, for `torch.serialization.add_safe_globals`."""
    return [QuantizedTensor, *FORMATS]


class QuantizedTensor(Tensor):
    """A matrix (N, K) in a storage format, or several of one shape (E, N, K), as experts keep theirs; `transposed`: the
    (K, N) view of it, or (E, K, N), as the layers of GPT-2 keep theirs.

    Attributes:
        codes, scale, zero: the packed parts, of the matrix (N, K); see `formats.Packed`. Those of several matrices lie
            one behind the other (E, ...). Scales of groups may be of any float dtype.
        order: (K,) int64, which column of the matrix each stored column is, where they are not stored in order.
        format: how they are read.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    format: Format
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        packed: Packed,
        format: Format,
        shape: Sequence[int],
        dtype: torch.dtype,
        transposed: bool = False,
        order: Tensor | None = None,
    ) -> Self:
        *lead, rows, columns = shape
        last = (1, rows) if transposed else (columns, 1)
        strides = (rows * columns, *last) if lead else last
        return torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides=strides, dtype=dtype, device=packed.codes.device, requires_grad=False
        )

    def __init__(
        self,
        packed: Packed,
        format: Format,
        shape: Sequence[int],
        dtype: torch.dtype,
        transposed: bool = False,
        order: Tensor | None = None,
    ) -> None:
        self.codes, self.scale, self.zero, self.order = packed.codes, packed.scale, packed.zero, order
        self.format, self.transposed = format, transposed

    @classmethod
    def quantize(cls, weight: Tensor, format: Format, transposed: bool = False) -> Self:
        """Quantize a float weight (N, K) or (E, N, K); (K, N) or (E, K, N) where `transposed`.

        Raises:
            FormatError: the weight can't be held in this format.
        """
        with torch.no_grad():
            packed = _quantized(weight.detach().mT if transposed else weight.detach(), format)
        return cls(packed, format, weight.shape, weight.dtype, transposed)

    @property
    def packed(self) -> Packed:
        """The packed parts."""
        return Packed(self.codes, self.scale, self.zero)

    @property
    def columns(self) -> int:
        """K: what the rows of the matrix have in common."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed parts."""
        return sum(getattr(self, name).nbytes for name in self.__tensor_flatten__()[0])

    def share_memory_(self) -> Self:
        """Move the packed parts to memory that processes share."""
        for name in self.__tensor_flatten__()[0]:
            getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the packed parts are in such memory."""
        shared: bool = self.codes.is_shared()
        return shared

    def dequantize(self) -> Tensor:
        """The float matrix that this stands for, in the dtype that it reports."""
        return _dequantized(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.format}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    # ---- what AOTAutograd asks of a traceable wrapper ----

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype, bool]]:
        names = [name for name in PARTS if getattr(self, name) is not None]
        return names, (str(self.format), self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, Tensor],
        context: tuple[str, torch.dtype, bool],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> "QuantizedTensor":
        name, dtype, transposed = context
        packed = Packed(parts["codes"], parts["scale"], parts.get("zero"))
        return QuantizedTensor(packed, parse_format(name), outer_size, dtype, transposed, parts.get("order"))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if (rule := _RULES.get(func)) is not None:
            result = rule(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        given, named = tree_map_only(QuantizedTensor, _dequantized, (tuple(args), dict(kwargs or {})))
        result = func(*given, **named)
        if func._schema.is_mutable:  # what was written into the float matrix is quantized
            for before, after in zip(args, given, strict=True):
                if isinstance(before, QuantizedTensor):
                    before.copy_(after)
            return args[0] if isinstance(args[0], QuantizedTensor) else result
        return result


def _dequantized(weight: QuantizedTensor) -> Tensor:
    """As an operator of ours, so that a captured graph says where packed data is read."""
    matrix: Tensor = torch.ops.llmcomp.dequantize(
        weight.codes, weight.scale, weight.zero, str(weight.format), weight.columns, weight.dtype
    )
    matrix = _unsorted(matrix, weight.order)
    return matrix.mT if weight.transposed else matrix


def _quantized(matrix: Tensor, format: Format) -> Packed:
    """The parts of a matrix (N, K), or of several (E, N, K)."""
    if matrix.dim() != 3:
        return format.quantize(matrix)
    packed = format.quantize(matrix.flatten(0, 1))
    codes, scale, zero = (
        None if part is None else part.unflatten(0, matrix.shape[:2])
        for part in (packed.codes, packed.scale, packed.zero)
    )
    assert codes is not None and scale is not None
    return Packed(codes, scale, zero)


def _unsorted(stored: Tensor, order: Tensor | None) -> Tensor:
    """Columns as they are stored, in the order of the matrix."""
    return stored if order is None else stored.index_select(-1, order.argsort())


def _on_parts(weight: QuantizedTensor, each: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    """A weight of the same format whose parts are those of `weight` after `each`."""
    zero, order = (None if part is None else each(part) for part in (weight.zero, weight.order))
    packed = Packed(each(weight.codes), each(weight.scale), zero)
    return QuantizedTensor(packed, weight.format, weight.shape, weight.dtype, weight.transposed, order)


def _alike(func: torch._ops.OpOverload, weight: QuantizedTensor, **kwargs: Any) -> Any:
    """detach, alias, clone, empty_like: the same of every part, unless another dtype is wanted."""
    if kwargs.get("dtype") is not None:
        return NotImplemented
    return _on_parts(weight, lambda part: func(part, **kwargs))


def _to_copy(
    func: torch._ops.OpOverload, weight: QuantizedTensor, *, dtype: torch.dtype | None = None, **kwargs: Any
) -> Any:
    """A change of device moves the parts; a change of float dtype changes what the weight stands for on reading."""
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    kwargs.pop("memory_format", None)
    moved = _on_parts(weight, lambda part: func(part, **kwargs))
    dtype = dtype or weight.dtype
    return QuantizedTensor(moved.packed, weight.format, weight.shape, dtype, weight.transposed, moved.order)


def _transpose(func: torch._ops.OpOverload, weight: QuantizedTensor, *dims: Any) -> Any:
    last = weight.dim() - 1
    order = dims[0] if func is aten.permute.default else _swapped(weight.dim(), *(dims or (0, 1)))
    if [d % weight.dim() for d in order] != [*range(last - 1), last, last - 1]:
        return NotImplemented
    shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    return QuantizedTensor(weight.packed, weight.format, shape, weight.dtype, not weight.transposed, weight.order)


def _swapped(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _picked(func: torch._ops.OpOverload, weight: QuantizedTensor, *at: Any) -> Any:
    """One of several matrices, or some of them: select along the first axis, or an index of that alone."""
    if weight.dim() != 3 or weight.order is not None:
        return NotImplemented
    if func is aten.select.int and at[0] % 3 != 0:
        return NotImplemented
    if func is aten.index.Tensor and (len(at[0]) != 1 or at[0][0].dim() != 1):
        return NotImplemented
    if func is aten.index.Tensor and weight.codes.dtype == torch.float8_e4m3fn:
        return NotImplemented  # torch does not index codes of 8 bit floats
    codes, scale = func(weight.codes, *at), func(weight.scale, *at)
    packed = Packed(codes, scale, None if weight.zero is None else func(weight.zero, *at))
    shape = (*codes.shape[:-2], *weight.shape[1:])
    return QuantizedTensor(packed, weight.format, shape, weight.dtype, weight.transposed)


def _embedding(func: torch._ops.OpOverload, weight: QuantizedTensor, indices: Tensor, *rest: object) -> Any:
    """Rows of the packed parts, dequantized: a table is never made float as a whole."""
    if weight.transposed or weight.dim() != 2:
        return NotImplemented
    rows = [None if part is None else _rows(part, indices) for part in (weight.codes, weight.scale, weight.zero)]
    stored = torch.ops.llmcomp.dequantize(*rows, str(weight.format), weight.columns, weight.dtype)
    return _unsorted(stored, weight.order)


def _rows(part: Tensor, indices: Tensor) -> Tensor:
    """Rows as an embedding takes them, which refuses indices that are out of range."""
    if part.dtype == torch.float8_e4m3fn:
        return _rows(part.view(torch.uint8), indices).view(part.dtype)
    if part.dim() == 1:
        return _rows(part.unsqueeze(1), indices).squeeze(-1)
    rows: Tensor = aten.embedding.default(part, indices)
    return rows


def _dynamic(weight: Any, x: Any, bias: Any = None) -> bool:
    """Whether the product of `x` with `weight` quantizes `x`."""
    if not isinstance(weight, QuantizedTensor) or not weight.format.dynamic or x.dtype != weight.dtype:
        return False
    return not isinstance(x, QuantizedTensor) and not isinstance(bias, QuantizedTensor)


def _product(weight: QuantizedTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.order is not None:
        x = x.index_select(-1, weight.order)
    product: Tensor = torch.ops.llmcomp.packed_linear(
        x, weight.codes, weight.scale, weight.zero, bias, str(weight.format)
    )
    return product


def _linear(func: torch._ops.OpOverload, x: Any, weight: Any, bias: Any = None) -> Any:
    """Where columns are stored in another order, the inputs are brought into it: the matrix stays as it is stored."""
    if _dynamic(weight, x, bias) and not weight.transposed:
        return _product(weight, x, bias)
    if not isinstance(weight, QuantizedTensor) or weight.order is None or weight.transposed:
        return NotImplemented
    stored = QuantizedTensor(weight.packed, weight.format, weight.shape, weight.dtype)
    return func(x.index_select(-1, weight.order), stored, bias)


def _mm(func: torch._ops.OpOverload, x: Any, weight: Any) -> Any:
    """x @ weight.t() is a layer; x @ weight is the way back of its gradient."""
    return _product(weight, x) if _dynamic(weight, x) and weight.transposed else NotImplemented


def _mv(func: torch._ops.OpOverload, weight: Any, x: Any) -> Any:
    return _product(weight, x) if _dynamic(weight, x) and not weight.transposed else NotImplemented


def _addmm(func: torch._ops.OpOverload, bias: Any, x: Any, weight: Any, **factors: Any) -> Any:
    if factors or not _dynamic(weight, x, bias) or not weight.transposed or bias.dim() != 1:
        return NotImplemented
    return _product(weight, x, bias)


def _copy(func: torch._ops.OpOverload, weight: Any, source: Tensor, non_blocking: bool = False) -> Any:
    """Writing to a quantized weight quantizes; from one of the same format it moves the parts."""
    if not isinstance(weight, QuantizedTensor):
        return NotImplemented
    moves = isinstance(source, QuantizedTensor) and _layout(source) == _layout(weight)
    if moves and weight.order is not None:
        moves = torch.equal(source.order, weight.order)  # type: ignore[attr-defined]
    if isinstance(source, QuantizedTensor) and not moves:
        source = source.dequantize()
    given = source.packed if isinstance(source, QuantizedTensor) else _packed_of(source, weight)
    for name in ("codes", "scale", "zero"):
        if (part := getattr(weight, name)) is not None:
            part.copy_(getattr(given, name))
            if not part.is_inference():  # below autograd nobody counts: llmcomp/prepared.py does
                torch.autograd.graph.increment_version(part)
    return weight


def _layout(weight: QuantizedTensor) -> tuple[object, ...]:
    """Weights of which this is the same have parts of the same shapes and dtypes."""
    return weight.format, weight.transposed, weight.shape, weight.scale.dtype, weight.order is None


def _packed_of(source: Tensor, weight: QuantizedTensor) -> Packed:
    """What `weight` becomes when `source` is written to it."""
    if source.shape != weight.shape:
        source = source.expand(weight.shape)  # raises where the shapes do not belong together
    matrix = source.to(weight.codes.device)
    matrix = (matrix.mT if weight.transposed else matrix).to(weight.dtype)
    if weight.order is not None:
        matrix = matrix.index_select(-1, weight.order)
    packed = _quantized(matrix, weight.format)
    return packed if packed.scale.dtype == weight.scale.dtype else _rescaled(packed, matrix, weight)


def _rescaled(packed: Packed, matrix: Tensor, weight: QuantizedTensor) -> Packed:
    """The same with scales as `weight` stores them, and codes that are rounded against these."""
    info = torch.finfo(weight.scale.dtype)
    scale = packed.scale.float().clamp(info.min, info.max).to(weight.scale.dtype)
    scale = torch.where(scale == 0, info.smallest_normal, scale)
    codes = weight.format.round(grouped(matrix.float(), weight.format.group), scale, packed.zero)
    return weight.format.packed(codes.flatten(-2), scale, packed.zero)


_RULES: Mapping[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.detach.default: _alike,
    aten.alias.default: _alike,
    aten.clone.default: _alike,
    aten.empty_like.default: _alike,
    aten._to_copy.default: _to_copy,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.select.int: _picked,
    aten.index.Tensor: _picked,
    aten.embedding.default: _embedding,
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.mv.default: _mv,
    aten.addmm.default: _addmm,
    aten.copy_.default: _copy,
}

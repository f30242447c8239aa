"""Caches of fixed size that were made in the model's dtype hold codes from the first compiled call on.

    layer.keys   bfloat16 (B, H, C, D)   ->   layer.keys   QuantizedCacheTensor (B, H, C, D): codes and scales

Memory that transformers' StaticCache makes inside a compiled call holds codes at once (passes/quantize_cache.py). Made
earlier, by `early_initialization` or by calls that ran in eager, it is an input of the graph in the model's dtype.
Such a graph is compiled as if it were given codes. A call of it moves what the layers hold into codes, so that every
later call finds them there, and the old memory is freed: a graph for full precision is never made, nor one too many.
"""

import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from llmcomp.cache_ops import quantized
from llmcomp.capture import needs_grad
from llmcomp.headroom import telling
from llmcomp.passes.base import PassResult
from llmcomp.passes.quantize_cache import FLOATS, stays_plain
from llmcomp.quantized_cache import QuantizedCacheTensor

Places = list[tuple[Any, str]]


def plain_caches(gm: GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions among the inputs of a Dynamo graph of keys and values that a StaticCache holds in full precision."""
    if needs_grad(gm, inputs):
        return ()
    places = _places(t for t in inputs if _may_be_held(t))
    return tuple(i for i, t in enumerate(inputs) if id(t) in places)


def _may_be_held(value: object) -> bool:
    plain = isinstance(value, Tensor) and not isinstance(value, QuantizedCacheTensor | nn.Parameter)
    return plain and value.dim() == 4 and value.dtype in FLOATS  # type: ignore[attr-defined]


def _places(tensors: Iterable[Tensor]) -> dict[int, Places]:
    """The attributes of layers of static caches that are one of `tensors`, by its id."""
    wanted = {id(t) for t in tensors}
    layer = getattr(sys.modules.get("transformers.cache_utils"), "StaticLayer", None)
    found: dict[int, Places] = {}
    if layer is None or not wanted:
        return found
    # `isinstance` would ask weak proxies what they stand for.
    for owner in (o for o in gc.get_objects() if issubclass(type(o), layer)):
        for name in ("keys", "values"):
            held = vars(owner).get(name)
            if id(held) in wanted:
                found.setdefault(id(held), []).append((owner, name))
    return found


def with_codes(gm: GraphModule, inputs: Sequence[Any], positions: Sequence[int], dtype: torch.dtype) -> list[Any]:
    """Example inputs of a Dynamo graph where those at `positions` are codes and scales of their symbolic sizes."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    changed = list(inputs)
    for i in positions:
        fake: Tensor = placeholders[i].meta["example_value"]
        codes = fake.new_empty(fake.shape, dtype=dtype)
        scale = fake.new_empty((*fake.shape[:-1], 1), dtype=torch.float32)
        changed[i] = QuantizedCacheTensor(codes, scale, fake.dtype)
    return changed


class TakingOver:
    """A compiled Dynamo graph that reads codes, called with caches in full precision at `positions`."""

    def __init__(self, run: Callable[..., Any], positions: Sequence[int], dtype: torch.dtype) -> None:
        """`run` takes tensors that hold codes of `dtype` there."""
        self.run, self.positions, self.dtype = run, positions, dtype

    def __call__(self, *inputs: Any) -> Any:
        """Have the layers hold codes, then call.

        Raises:
            MemoryFullError: the device has too little memory; the layers then are as they were.
        """
        given = list(inputs)
        places = _places(inputs[i] for i in self.positions)
        for i in self.positions:
            given[i] = _coded(inputs[i], self.dtype)
        for i in self.positions:
            for owner, name in places.get(id(inputs[i]), ()):
                setattr(owner, name, given[i])
        results = self.run(*given)
        for i in self.positions:
            if id(inputs[i]) not in places:  # of somebody that garbage collection does not know
                inputs[i].copy_(given[i])
        return results


def _coded(memory: Tensor, dtype: torch.dtype) -> QuantizedCacheTensor:
    rows = memory.numel() // max(memory.shape[-1], 1)
    with torch.no_grad(), telling(memory.numel() + 4 * rows, memory.shape, memory.device):
        codes, scale = (t.contiguous() for t in quantized(memory, dtype))
    made = QuantizedCacheTensor(codes, scale, memory.dtype)
    if hasattr(memory, "_dynamo_static_input_type"):
        torch._dynamo.mark_static_address(made)
    return made


def warn_of_plain(results: Sequence[PassResult], kv_dtype: str | None) -> None:
    """Say, once for each reason, that a cache stays in the dtype of the model though `kv_dtype` was asked for."""
    misses = (m.reason for r in results if r.name == "quantize_cache" for m in r.report.near_misses)
    for reason in misses:
        if kv_dtype is not None and stays_plain(reason):
            _warn(reason, kv_dtype)


@cache
def _warn(reason: str, kv_dtype: str) -> None:
    warnings.warn(
        f"llmcomp: expected caches that can hold {kv_dtype} (kv_dtype={kv_dtype!r}), found one that stays as it is: "
        f"{reason}. Results are right, its memory is not halved: use the caches of transformers, or leave kv_dtype out",
        stacklevel=2,
    )

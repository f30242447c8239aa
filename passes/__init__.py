"""The passes, FX graph to FX graph, and the pipeline that lists them in order."""

import torch
from torch.fx import Node

from llmcomp.hints import volume
from llmcomp.passes.base import Pass
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.fuse_linear import fuse_epilogue, fuse_prologue, fuse_siblings
from llmcomp.passes.groups import Fits, Library
from llmcomp.passes.insert_kv_cache import insert_kv_cache
from llmcomp.passes.partition import partition
from llmcomp.passes.quantize import QUANTIZE
from llmcomp.passes.quantize_cache import quantize_cache
from llmcomp.passes.recognize_activation import RECOGNIZE_ACTIVATION
from llmcomp.passes.recognize_append import RECOGNIZE_APPEND
from llmcomp.passes.recognize_attention import RECOGNIZE_ATTENTION
from llmcomp.passes.recognize_bmm import recognize_bmm
from llmcomp.passes.recognize_cache import RECOGNIZE_CACHE
from llmcomp.passes.recognize_experts import RECOGNIZE_EXPERTS
from llmcomp.passes.recognize_gated import RECOGNIZE_GATED
from llmcomp.passes.recognize_linear import RECOGNIZE_LINEAR
from llmcomp.passes.recognize_norm import RECOGNIZE_NORM
from llmcomp.passes.recognize_rope import RECOGNIZE_ROPE
from llmcomp.passes.share import SHARE
from llmcomp.products import BLOCKS, GROUPED, MASKED, PACKED, PACKED_GROUPED, TWO_FOUR
from llmcomp.target import Target


def pipeline(
    target: Target, fits: Fits, kv_dtype: torch.dtype | None = None, strided_results: bool = False
) -> tuple[Pass, ...]:
    """The compiler, in order. `fits` says why a region cannot be one kernel, or None where it can.

    Caches that graphs make hold codes of `kv_dtype` where one is given; `strided_results` is the option.
    """
    library = _left_to_library(target)
    return (
        *recognizing(),
        QUANTIZE,  # linear layers read quantized weights as they are stored
        *([quantize_cache(kv_dtype)] if kv_dtype else []),  # keys and values that are returned -> codes and scales
        insert_kv_cache(kv_dtype, strided_results),  # a proof that only new positions need computing: llmcomp/reuse.py
        RECOGNIZE_APPEND,  # cat of a past with new keys or values -> cache_grow and cache_write_
        recognize_bmm(library),  # products of batches of matrices -> grouped_linear
        CANONICALIZE,  # copies that only the old forms needed
        fuse_siblings(fits, library),  # q, k and v; gate and up: one kernel reads the operand once
        fuse_epilogue(fits),  # bias, residual, activation, rotary embedding, cache write
        fuse_prologue(fits, rows, most_rows=16),  # the norm before a linear layer
        partition(fits),  # every remaining node belongs to one kernel, or to an eager call
    )


def recognizing() -> tuple[Pass, ...]:
    """The passes that give what a graph computes its name."""
    return (
        RECOGNIZE_CACHE,  # index_copy and copy_ of static caches -> cache_write_, in place
        RECOGNIZE_LINEAR,  # linear, addmm and mm of views -> llmcomp.linear
        RECOGNIZE_EXPERTS,  # grouped products of experts -> grouped_linear
        CANONICALIZE,  # one spelling per operator, no-ops gone
        SHARE,  # what is computed twice is computed once
        RECOGNIZE_NORM,  # chains of mean, rsqrt and mul -> rms_norm, layer_norm
        RECOGNIZE_ROPE,  # rotations of pairs of channels -> rope
        RECOGNIZE_ACTIVATION,  # written-out activations -> one operator
        RECOGNIZE_GATED,  # act(gate) * up -> gated
        RECOGNIZE_ATTENTION,  # softmax(q k) v in all its forms -> attention
    )


def rows(product: Node) -> int:
    """Rows that meet one matrix in a linear layer or a batched product, in the call that was traced."""
    operand = product.args[0]
    assert isinstance(operand, Node)
    batched = product.target is torch.ops.aten.bmm.default
    return volume(operand.meta["val"].shape[1 if batched else 0 : -1])


def _left_to_library(target: Target) -> Library:
    """Whether a linear layer or a batched product is one that the CPU's library does at the speed of the arithmetic.

    Few rows are bound by reading the weight, where a kernel of ours can fuse what comes before and after.
    """

    ours = (GROUPED, PACKED, PACKED_GROUPED, TWO_FOUR, MASKED, BLOCKS)

    def library(linear: Node) -> bool:
        return target.name == "cpp" and linear.target not in ours and rows(linear) > 16

    return library

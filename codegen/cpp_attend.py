"""Attend -> C++: for each query row, blocks of keys with an online softmax.

    for each (batch, head, query):
        for each block of keys inside [key_start, key_end):
            scores = scale * q . k, then the score body over the block
            the running maximum grows: rescale what is summed so far
            total += exp(score - maximum); acc += exp(score - maximum) * v
        out = acc / total
"""

from collections.abc import Sequence
from dataclasses import replace

import sympy

from llmcomp.codegen.build import Source
from llmcomp.codegen.cpp import symbol
from llmcomp.codegen.cpp_body import Writer, make_scope, print_statements
from llmcomp.codegen.cpp_expr import index
from llmcomp.codegen.cpp_function import count, item_loop, kernel_function
from llmcomp.codegen.kernel import Attend, Store, Strided, vectors

BLOCK = 64


def render_attend(kernel: Attend, comment: Sequence[str] = ()) -> Source:
    """The C++ source of `kernel`; `comment` names the graph nodes that it computes."""
    import torch

    kernel = replace(kernel, name=symbol(kernel.name))
    j = kernel.keys.symbol
    scope = make_scope(kernel.buffers, [kernel.score], {"score": torch.float32})
    varying = vectors(kernel.score, j, ("score",))
    once = [s for s in kernel.score if not isinstance(s, Store) and s.out not in varying]
    rest = [s for s in kernel.score if s not in once]
    axes = [kernel.batch, kernel.heads, kernel.queries]
    b, h, i = (a.symbol for a in axes)
    head = sympy.Symbol("kv_head", integer=True, nonnegative=True)
    channel = sympy.Symbol("d", integer=True, nonnegative=True)

    def at(operand: Strided, h_: sympy.Expr, position: sympy.Expr, d: sympy.Expr) -> str:
        place = (b, h_, position, d)
        terms = (s * x for s, x in zip(operand.strides, place, strict=True))
        return f"{operand.buffer}[{index(operand.offset + sympy.Add(*terms))}]"

    w = Writer()
    items, work = count(axes), sympy.Mul(count([*axes, kernel.keys]), kernel.head_dim)
    with kernel_function(w, kernel.name, kernel.buffers, kernel.sizes, [kernel.score], scope, items, work):
        with item_loop(w, axes):
            w.line(f"const int64_t kv_head = {h} / {kernel.group};")
            w.line(f"float query[{kernel.head_dim}], acc[{kernel.value_dim}] = {{}}, weight[{BLOCK}];")
            w.line(f"for (int64_t d = 0; d < {kernel.head_dim}; ++d) query[d] = {at(kernel.q, h, i, channel)};")
            if kernel.sinks:
                w.line(f"float highest = {kernel.sinks}[{h}], total = 1;")
            else:
                w.line("float highest = -__builtin_inff(), total = 0;")
            w.lines(print_statements(once, scope))
            w.line(f"const int64_t begin = {index(kernel.key_start)}, end = {index(kernel.key_end)};")
            with w.block(f"for (int64_t start = begin; start < end; start += {BLOCK})"):
                w.line(f"const int64_t keys = op::minimum<int64_t>({BLOCK}, end - start);")
                with w.block("for (int64_t n = 0; n < keys; ++n)"):
                    w.line(f"const int64_t {j} = start + n;")
                    w.line("float dot = 0;")
                    w.line("#pragma omp simd reduction(+ : dot)")
                    w.line(f"for (int64_t d = 0; d < {kernel.head_dim}; ++d) dot += query[d] * {at(kernel.k, head, j, channel)};")
                    w.line(f"weight[n] = dot * {kernel.scale!r}f;")
                w.line("float peak = highest;")
                with w.block("for (int64_t n = 0; n < keys; ++n)"):
                    w.line(f"const int64_t {j} = start + n;")
                    w.line("const float score = weight[n];")
                    w.lines(print_statements(rest, scope))
                    w.line(f"weight[n] = {kernel.score_value};")
                    w.line(f"peak = op::maximum(peak, {kernel.score_value});")
                w.line("if (peak == -__builtin_inff()) continue;  // every key so far is masked")
                w.line("const float rescale = op::exp(highest - peak);")
                w.line("highest = peak;")
                w.line("total *= rescale;")
                w.line("#pragma omp simd")
                w.line(f"for (int64_t d = 0; d < {kernel.value_dim}; ++d) acc[d] *= rescale;")
                with w.block("for (int64_t n = 0; n < keys; ++n)"):
                    w.line(f"const int64_t {j} = start + n;")
                    w.line("const float p = op::exp(weight[n] - peak);")
                    w.line("total += p;")
                    w.line("#pragma omp simd")
                    w.line(f"for (int64_t d = 0; d < {kernel.value_dim}; ++d) acc[d] += p * {at(kernel.v, head, j, channel)};")
            w.line("const float inverse = total > 0 ? 1 / total : 0.0f;")
            w.line(f"for (int64_t d = 0; d < {kernel.value_dim}; ++d) {at(kernel.out, h, i, channel)} = acc[d] * inverse;")
    return Source(kernel.name, "cpp", w.text(), tuple(comment))

"""Kernel -> source: which printer writes which family for which target."""

from collections.abc import Sequence

from llmcomp.codegen import cpp
from llmcomp.codegen.build import Source
from llmcomp.codegen.cpp_attend import render_attend
from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.codegen.kernel import Attend, Contract, Kernel


def render_cpp(kernel: Kernel, comment: Sequence[str]) -> Source:
    """A kernel as C++; `comment` names the graph nodes that it computes."""
    match kernel:
        case Contract():
            return render_contract(kernel, comment)
        case Attend():
            return render_attend(kernel, comment)
    return cpp.render(kernel, comment)


def render_triton(kernel: Kernel, comment: Sequence[str]) -> Source:
    """A kernel as a Python module with a Triton kernel and its launcher."""
    from llmcomp.codegen import triton

    return triton.render(kernel, comment)

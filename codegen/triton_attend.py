"""Attend as Triton: not printed yet."""

from llmcomp.codegen.kernel import Attend


def render_attend(kernel: Attend) -> str:
    """The Triton text of an Attend."""
    raise NotImplementedError("no Triton printer for Attend")

"""Contract as Triton: not printed yet."""

from llmcomp.codegen.kernel import Contract


def render_contract(kernel: Contract) -> str:
    """The Triton text of a Contract."""
    raise NotImplementedError("no Triton printer for Contract")

"""The target without kernels: a graph run node by node, by eager ATen and the references of llmcomp's ops.

For `options={"target": "reference"}`, for devices without a target of their own, and to check the others.
"""

from typing import Any

from torch.fx import GraphModule

from llmcomp.report import ExternReport, ProgramReport


class ReferenceProgram:
    """Runs a graph as it stands: flat inputs in, the tuple of flat outputs out."""

    def __init__(self, gm: GraphModule, reason: str) -> None:
        """`reason` tells the report why nothing was generated."""
        self._run = gm.forward
        self.source = gm.code
        calls = (n for n in gm.graph.nodes if n.op == "call_function")
        externs = tuple(ExternReport(str(n.target), n.name, reason) for n in calls)
        self.report = ProgramReport("reference", externs=externs)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = self._run(*inputs)
        return outputs

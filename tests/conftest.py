"""Fixtures that several test modules share."""

from collections.abc import Iterator

import pytest
import torch

import llmcomp.backend
from llmcomp.report import GraphReport


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphReport]]:
    """The reports of the ATen graphs that the backend compiles during the test, in order.

    Dynamo falls back to eager in silence: a test that compares with eager proves nothing until it has also
    looked here for the graphs.
    """
    seen: list[GraphReport] = []
    compile_aten = llmcomp.backend.compile_aten

    def spy(*args: object) -> object:
        result = compile_aten(*args)  # type: ignore[arg-type]
        seen.append(result[1])
        return result

    torch._dynamo.reset()
    monkeypatch.setattr(llmcomp.backend, "compile_aten", spy)
    yield seen
    torch._dynamo.reset()

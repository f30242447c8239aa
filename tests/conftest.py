"""Fixtures that several test modules share."""

import os
from collections.abc import Iterator

import pytest
import torch

import llmcomp.backend
from llmcomp.report import GraphReport


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests build out of the user's cache; the next run finds it again."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        os.environ.setdefault("LLMCOMP_CACHE", str(cache.mkdir("llmcomp")))


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

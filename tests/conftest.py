"""Fixtures that several test modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

# Workers share the cores: a thread that waits must not spin. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import llmcomp.backend
from llmcomp.report import GraphReport
from tests.triton_worker import MODULES

# Most tests ask whether kernels are right, and most of their time is the compiler's: it does not optimize for them.
QUICK = "-O0"


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests build out of the user's cache, where the next run finds it again; build it quickly."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        os.environ.setdefault("LLMCOMP_CACHE", str(cache.mkdir("llmcomp")))
    os.environ.setdefault("LLMCOMP_CXXFLAGS", QUICK)


# Files whose tests take long and share nothing: each test goes to the worker that is free.
SPREAD = tuple(f"test_{name}.py" for name in "bench bench_gpu integrate kv_cache kv_dtype models".split())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With -n, leave a file to one worker: its tests share what the first of them builds.

    So do those that wait for Triton's processes, in whatever file: one worker waits, the others go on.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if Path(file).stem in MODULES:
                return "Triton"
            return nodeid if file.endswith(SPREAD) else file

    return ByFile(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="module", autouse=True)
def optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    """Build the kernels of the files that are about C++ as users do: every family, with optimization."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name.startswith("test_cpp"):
            patch.delenv("LLMCOMP_CXXFLAGS", raising=False)
        yield


@pytest.fixture
def fresh() -> Iterator[None]:
    """A seed, and nothing that Dynamo remembers, before or after."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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

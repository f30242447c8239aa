"""Runs the tests marked `interpreted` and `assembled` in two processes of their own, once for all of them.

Triton either interprets kernels or compiles them, for the life of a process. So a test of Triton kernels is a
plain function under one of the two marks: pytest looks up what became of it in the process of its kind, which
imports the test modules and runs every marked function with every set of parameters.

    @interpreted
    @pytest.mark.parametrize("rows", [1, 5])
    def test_sum(rows: int) -> None: ...
"""

import fcntl
import functools
import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

MODULES = (
    "test_triton",
    "test_triton_contract",
    "test_triton_packed",
    "test_triton_attend",
    "test_triton_program",
    "test_triton_quantized",
    "test_triton_sequences",
    "test_triton_sweep",
    "test_triton_two_four",
    "test_triton_experts",
    "test_triton_blocks",
    "test_assemble",
)
KIND = "LLMCOMP_TRITON_TESTS"  # set in a process of a kind
LIMIT = 600.0  # seconds

Test = Callable[..., None]


def interpreted(test: Test) -> Test:
    """Run `test` under Triton's interpreter."""
    return _elsewhere("interpreted", test)


def assembled(test: Test) -> Test:
    """Run `test` in a process where Triton compiles, with no GPU; these are slow."""
    return _elsewhere("assembled", pytest.mark.slow(test))


def _elsewhere(kind: str, test: Test) -> Test:
    if KIND in os.environ:
        test.__dict__["kind"] = kind
        return test

    @functools.wraps(test)
    def look_up(**parameters: object) -> None:
        found = outcomes(kind, is_slow(look_up))
        failure = found[key(test, parameters)]
        if failure is not None:
            pytest.fail(failure, pytrace=False)

    return look_up


def is_slow(test: Test) -> bool:
    """Whether a test has the mark: those that don't are run without waiting for those that do."""
    return any(mark.name == "slow" for mark in getattr(test, "pytestmark", []))


def key(test: Test, parameters: dict[str, object]) -> str:
    """The name of one run of a test."""
    return f"{test.__module__.split('.')[-1]}.{test.__name__}{sorted(parameters.items())!r}"


@functools.cache
def outcomes(kind: str, slow: bool) -> dict[str, str | None]:
    """For every test of `kind`, slow or not, its traceback or None; shared by the processes of a run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"llmcomp-triton-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    report = folder / f"{kind}-{'slow-' if slow else ''}{run}.json"
    with open(report.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            _run(kind, slow, report)
    return dict(json.loads(report.read_text()))


def _run(kind: str, slow: bool, report: Path) -> None:
    environment = {
        **os.environ,
        KIND: kind,
        "TRITON_INTERPRET": "1" if kind == "interpreted" else "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, "-m", "tests.triton_worker", str(report), *(["slow"] if slow else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode != 0:
        raise RuntimeError(f"the {kind} process failed:\n{done.stdout}\n{done.stderr}")


# ---- inside such a process ------------------------------------------------------------------------------


def runs(kind: str, slow: bool) -> Iterator[tuple[str, Test, dict[str, Any]]]:
    """Every marked test of `kind`, slow or not, with every set of its parameters."""
    for name in MODULES:
        module = importlib.import_module(f"tests.{name}")
        for _, test in inspect.getmembers(module, inspect.isfunction):
            if getattr(test, "kind", "") == kind and is_slow(test) == slow and test.__module__ == module.__name__:
                for parameters in _parameters(test):
                    yield key(test, parameters), test, parameters


def _parameters(test: Test) -> Iterator[dict[str, Any]]:
    marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
    axes = []
    for mark in marks:
        names = [n.strip() for n in mark.args[0].split(",")]
        axes.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in mark.args[1]])
    for chosen in itertools.product(*axes):
        yield {name: value for part in chosen for name, value in part.items()}


def main(report: Path, slow: bool) -> None:
    """Run all tests of this process's kind and write the outcomes as JSON."""
    found: dict[str, str | None] = {}
    for name, test, parameters in runs(os.environ[KIND], slow):
        torch.manual_seed(0)
        try:
            test(**parameters)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    partial = report.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(report)


if __name__ == "__main__":
    main(Path(sys.argv[1]), slow="slow" in sys.argv[2:])

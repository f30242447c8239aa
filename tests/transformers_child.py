"""Run tests of a transformers checkout with every model that generates compiled by llmcomp; a child process.

    python -m tests.transformers_child CHECKOUT llama                    prints Class::test of each generation test
    python -m tests.transformers_child CHECKOUT llama Class::test ...    runs these, in this order

A model is compiled in place as soon as it is built. The tests of a `CompileConfig` count graphs and want the
prompt in eager: theirs is the model that it compiles, with llmcomp for Inductor. What tests/children.py reads is
printed for each test: its verdict and how many graphs we compiled.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from tests.children import ROOT, report

WITH_CONFIG = (
    "test_generate_compilation_all_outputs",
    "test_generate_compile_model_forward_fullgraph",
    "test_static_cache_no_recompile_with_smaller_length",
)


class Compiled:
    """A pytest plugin that runs the tests called `names`, or only lists what there is.

    `graphs` counts the graphs that llmcomp compiled during the test that runs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.graphs = 0
        self.reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid.partition("::")[2]: item for item in items if about_generation(item)}
        items[:] = [found[name] for name in self.names if name in found]
        if not self.names:
            report({"names": list(found)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext, file=sys.stderr)

    def pytest_runtest_setup(self) -> None:
        seed()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with everything_compiled(self.count, in_place=item.name not in WITH_CONFIG):
            return (yield)

    def count(self) -> None:
        """One more graph was compiled."""
        self.graphs += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self) -> None:
        report({**summary(self.reports), "graphs": self.graphs})
        self.graphs, self.reports = 0, []


def seed() -> None:
    """Give a test the same weights and inputs each time: from torch, and from a generator of their own."""
    import torch

    torch.manual_seed(0)
    common = sys.modules.get("tests.test_modeling_common")
    if common is not None:
        common.global_rng.seed(0)


def about_generation(item: pytest.Item) -> bool:
    """Whether a test is one of GenerationTesterMixin or has the mark torch_compile_test, in a class of model tests."""
    mixins = [c for c in getattr(item, "cls", object).__mro__ if c.__name__ == "GenerationTesterMixin"]
    marked = item.get_closest_marker("torch_compile_test") is not None
    return bool(mixins) and (marked or item.name in vars(mixins[0]))


def summary(reports: Sequence[pytest.TestReport]) -> dict[str, str]:
    """The verdict of one test and one line on it."""
    worst = max(reports, key=lambda r: ("passed", "skipped", "failed").index(r.outcome))
    if worst.outcome == "passed":
        return {"verdict": "passed", "detail": ""}
    if worst.outcome == "skipped" and isinstance(worst.longrepr, tuple):
        return {"verdict": "skipped", "detail": worst.longrepr[2]}
    crash = getattr(worst.longrepr, "reprcrash", None)
    text = str(worst.longrepr) if os.environ.get("LLMCOMP_TRACEBACKS") or crash is None else crash.message
    return {"verdict": worst.outcome, "detail": text}


@contextmanager
def everything_compiled(count: Callable[[], None], in_place: bool) -> Iterator[None]:
    """Compile every model that generates when it is built, or when its config says so; `count` each graph."""
    import torch
    from transformers import CompileConfig, GenerationMixin, PreTrainedModel

    import llmcomp.backend

    compile_aten, post_init, to_dict = llmcomp.backend.compile_aten, PreTrainedModel.post_init, CompileConfig.to_dict

    def counting(*args: Any) -> Any:
        count()
        return compile_aten(*args)

    def initialize(model: PreTrainedModel) -> None:
        post_init(model)
        if in_place and isinstance(model, GenerationMixin):
            model.compile(backend="llmcomp")

    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.enter_context(patch.object(llmcomp.backend, "compile_aten", counting))
        stack.enter_context(patch.object(PreTrainedModel, "post_init", initialize))
        stack.enter_context(patch.object(CompileConfig, "to_dict", lambda self: to_dict(self) | {"backend": "llmcomp"}))
        stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        yield


def enter(checkout: str) -> None:
    """Give the name `tests` to the package of the checkout: its files import one another by it."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(checkout)
    sys.path[:] = [checkout, *(p for p in sys.path if os.path.realpath(p or ".") != str(ROOT))]


def main(checkout: str, model: str, *names: str) -> int:
    """Run the tests called `names` of one model, or list them all."""
    import llmcomp.backend  # noqa: F401 - found before the paths change

    os.environ.setdefault("RUN_SLOW", "1")
    enter(checkout)
    files = f"tests/models/{model}/test_modeling_{model}.py"
    # Their settings and conftest are about their CI; a terminal report would get between the lines that we print.
    plain = ["--noconftest", "-c", os.devnull, "--rootdir", checkout, "-W", "ignore"]
    plain += [word for plugin in ("cacheprovider", "terminal") for word in ("-p", f"no:{plugin}")]
    return pytest.main([*plain, files], plugins=[Compiled(names)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

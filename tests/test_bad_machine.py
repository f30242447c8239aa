"""What the machine may refuse, through torch.compile: right results with one clear warning, or an error that says
what to do."""

import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing import assert_close

from llmcomp import program
from llmcomp.codegen import build, cache
from llmcomp.codegen.build import Source
from llmcomp.errors import BuildError, CacheError
from llmcomp.report import GraphReport

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)).eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test, and a temporary place of its own for what overflows."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache"


def run(model: nn.Module, folder: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = torch.compile(model, backend="llmcomp", options={"cache": folder})(X)
    return result


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "llmcomp" in str(w.message)]


# The cache folder.


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode says it, and mkstemp too: the tests may run as root, whom no mode stops."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o500)
    refusing(folder, monkeypatch, PermissionError(13, "Permission denied"))


def refusing(folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    mkstemp = build.tempfile.mkstemp

    def failing(dir: Path, prefix: str, suffix: str) -> tuple[int, str]:  # noqa: A002
        if Path(dir) == folder:
            raise error
        return mkstemp(dir=dir, prefix=prefix, suffix=suffix)

    monkeypatch.setattr(build.tempfile, "mkstemp", failing)


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files can be made, but writing to them fails: they are /dev/full."""
    mkstemp = build.tempfile.mkstemp

    def on_full_disk(dir: Path, prefix: str, suffix: str) -> tuple[int, str]:  # noqa: A002
        handle, name = mkstemp(dir=dir, prefix=prefix, suffix=suffix)
        if Path(dir) == folder:
            os.close(handle)
            handle = os.open("/dev/full", os.O_WRONLY)
        return handle, name

    monkeypatch.setattr(build.tempfile, "mkstemp", on_full_disk)


@pytest.mark.parametrize(("how", "reason"), [(read_only, "Permission denied"), (full, "No space left on device")])
def test_a_cache_that_cannot_be_written(
    how: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    model: nn.Module,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[GraphReport],
) -> None:
    how(folder, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close(run(model, folder), model(X))
    (text,) = warned(caught)
    overflow = cache.overflow_folder()
    assert f"cannot write to {folder} ({reason})" in text and str(overflow) in text and "Set LLMCOMP_CACHE" in text
    assert graphs[0].program.kernels and all(k.source.parent == overflow for k in graphs[0].program.kernels)
    assert stat.S_IMODE(overflow.stat().st_mode) == 0o700 and not list(folder.iterdir())


def test_kernels_in_a_read_only_cache_are_used(
    model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[GraphReport]
) -> None:
    run(model, folder)
    read_only(folder, monkeypatch)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "llmcomp")
        assert_close(run(model, folder), model(X))
    assert graphs[1].program.built == 0 and graphs[1].program.cached > 0


def test_no_folder_can_be_written(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(folder, monkeypatch)
    cache.overflow_folder().write_text("")  # a file stands in its place
    with (
        warnings.catch_warnings(),
        pytest.raises(BackendCompilerFailed, match="CacheError: expected a folder") as caught,
    ):
        warnings.simplefilter("ignore")
        run(model, folder)
    assert isinstance(caught.value.inner_exception, CacheError)


def test_a_cache_that_others_can_write(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(BackendCompilerFailed, match=f"CacheError: .*found mode 777.* Run: chmod go-w {folder}"):
        run(model, folder)


# The compiler.


def script(path: Path, body: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))


def broken_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(folder.parent / "c++", "exit 1"))


@pytest.mark.parametrize("how", [no_compiler, broken_compiler])
def test_no_compiler_on_the_machine(
    how: Callable[[Path, pytest.MonkeyPatch], None],
    model: nn.Module,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[GraphReport],
) -> None:
    program._warn_no_compiler.cache_clear()
    with monkeypatch.context() as machine, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        how(folder, machine)
        assert_close(run(model, folder), model(X))
        assert_close(run(nn.Sequential(model, nn.GELU()), folder), nn.functional.gelu(model(X)))
    (text,) = warned(caught)
    assert "found no C++ compiler" in text and "results are right" in text and "apt install g++" in text
    assert [g.program.target for g in graphs] == ["reference"] * 2
    torch._dynamo.reset()
    assert_close(run(model, folder), model(X))
    assert graphs[2].program.target == "cpp", "a compiler that was installed since is used"


def test_a_kernel_that_does_not_compile(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = program.render_cpp

    def wrong(*kernel: object) -> Source:
        source = render(*kernel)  # type: ignore[arg-type]
        return replace(source, text=source.text.replace("(", "(nonsense, ", 1))

    monkeypatch.setattr(program, "render_cpp", wrong)
    with pytest.raises(BackendCompilerFailed) as caught:
        run(model, folder)
    assert isinstance(caught.value.inner_exception, BuildError)
    text = str(caught.value)
    assert "expected the generated kernel" in text and "error: " in text
    (line,) = (line for line in text.splitlines() if line.startswith(">"))
    assert "nonsense" in line, "the line at fault"
    assert "llmcomp.layer_norm.default(" in text or "llmcomp.linear.default(" in text, "the nodes of the graph"
    assert str(folder) in text.splitlines()[-1] or f"The source is {folder}" in text
    assert len(text.splitlines()) < 60, "readable"


def test_a_compiler_that_is_killed(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a machine without memory: it says nothing at all."""
    body = 'case "$*" in *probe.cpp*|*--version*) exec c++ "$@";; esac; kill -9 $$'
    monkeypatch.setenv("CXX", script(folder.parent / "killed-c++", body))
    with pytest.raises(BackendCompilerFailed, match="BuildError: expected the .* found:\nexit status -9"):
        run(model, folder)
    monkeypatch.delenv("CXX")
    assert_close(run(model, folder), model(X))

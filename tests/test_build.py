"""The build cache: what is compiled when, and what happens when files, folders or compilers are broken."""

import ctypes
import multiprocessing
import os
import stat
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from llmcomp.codegen import build as module
from llmcomp.codegen import cache as storage
from llmcomp.codegen.build import Compiler, Source, build, file_stem, find_compiler
from llmcomp.codegen.cache import Cache, seal, sealed
from llmcomp.errors import BuildError, CacheError

SOURCE = Source(
    "answer",
    "cpp",
    '#include "prelude.h"\n\nextern "C" int64_t answer() {\n    return 42;\n}\n',
    ("%linear_1", "%add_2 = residual\\"),
)


def source(name: str, value: int) -> Source:
    return Source(name, "cpp", f'#include "prelude.h"\nextern "C" int64_t {name}() {{ return {value}; }}\n')


def call(built: module.Built) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int64)(built.function())())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache of this test alone, its overflow folder included."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    return Cache(tmp_path / "cache")


@pytest.fixture
def counting_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CXX is a script that counts its runs in the returned file."""
    log = tmp_path / "runs"
    log.touch()
    script = tmp_path / "counting-c++"
    script.write_text(f'#!/bin/sh\necho run >> {log}\nexec c++ "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def test_builds_and_calls_in_order(cache: Cache) -> None:
    sources = [source("one", 1), source("two", 2), source("one", 1)]
    built = build(sources, cache)
    assert [b.source for b in built] == sources
    assert [call(b) for b in built] == [1, 2, 1]
    assert [b.cached for b in built] == [False, False, True]
    assert built[0].path == built[2].path
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700


def test_source_on_disk_has_name_and_comment(cache: Cache) -> None:
    (built,) = build([SOURCE], cache)
    assert built.source_path.name.startswith("answer_") and built.source_path.suffix == ".cpp"
    assert built.source_path.read_text() == "// %linear_1\n// %add_2 = residual\n" + SOURCE.text
    other = Source(SOURCE.name, "cpp", SOURCE.text, ("%linear_9",))
    assert build([other], cache)[0].path == built.path


def test_warm_start_runs_no_compiler(cache: Cache, counting_compiler: Path) -> None:
    build([SOURCE], cache)
    runs = counting_compiler.read_text().count("run")
    assert runs >= 3  # version, probe, kernel
    (built,) = build([SOURCE], Cache(cache.root))
    assert built.cached and call(built) == 42
    assert counting_compiler.read_text().count("run") == runs


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_damaged_library_is_rebuilt(cache: Cache, damage: bytes | None) -> None:
    (built,) = build([source("damaged", 5)], cache)
    data = built.path.read_bytes()
    flipped = bytes([*data[:5000], data[5000] ^ 1, *data[5001:]])
    built.path.write_bytes(flipped if damage is None else data[: len(damage) * 1000])
    (again,) = build([source("damaged", 5)], cache)
    assert not again.cached and call(again) == 5
    assert again.path.read_bytes() == data


def test_lost_source_is_written_again(cache: Cache) -> None:
    (built,) = build([SOURCE], cache)
    built.source_path.unlink()
    (again,) = build([SOURCE], cache)
    assert again.cached and again.source_path.read_text() == "// %linear_1\n// %add_2 = residual\n" + SOURCE.text


def test_seal() -> None:
    assert sealed(seal(b"data")) and sealed(seal(b""))
    for bad in (b"", b"data", seal(b"data")[:-1], b"x" + seal(b"data"), seal(b"data") + b"x"):
        assert not sealed(bad)


def test_key_covers_what_decides_the_result(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(("c++",), "12", ("-O3",))
    stems = {file_stem(SOURCE, compiler)}
    stems.add(file_stem(Source("answer", "cpp", SOURCE.text + "\n"), compiler))
    stems.add(file_stem(SOURCE, Compiler(("c++",), "13", ("-O3",))))
    stems.add(file_stem(SOURCE, Compiler(("c++",), "12", ("-O2",))))
    stems.add(file_stem(SOURCE, Compiler(("g++",), "12", ("-O3",))))
    monkeypatch.setattr(module, "cpu_features", lambda: "another processor")
    stems.add(file_stem(SOURCE, compiler))
    monkeypatch.setattr(module, "included", lambda text: ["another prelude"])
    stems.add(file_stem(SOURCE, compiler))
    assert len(stems) == 7


def test_compile_error_shows_excerpt_and_nodes(cache: Cache) -> None:
    text = SOURCE.text.replace("return 42", "return v7")
    with pytest.raises(BuildError) as caught:
        build([Source("answer", "cpp", text, ("%mul_3 = mul(x, y)",))], cache)
    message = str(caught.value)
    assert "kernel answer" in message and "v7" in message and "%mul_3 = mul(x, y)" in message
    assert ">    5 |     return v7;" in message
    path = next(cache.root.glob("answer_*.cpp"))
    assert str(path) in message and "return v7" in path.read_text()


def test_no_compiler(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cache.root))
    assert find_compiler(cache) is None
    with pytest.raises(BuildError, match=r"expected a C\+\+ compiler .* found none that works. Install one"):
        build([SOURCE], cache)


# Fails; makes nothing; makes a file that is no library.
BROKEN = [
    "exit 1",
    "exit 0",
    '[ "$1" = --version ] && exit; for last; do :; done; echo no library > "$last"',
]


@pytest.mark.parametrize("script", BROKEN)
def test_compiler_that_does_not_work_counts_as_none(cache: Cache, tmp_path: Path, script: str) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    assert find_compiler(cache, str(broken)) is None
    assert find_compiler(cache, "no-such-compiler") is None


def test_command_with_arguments(cache: Cache) -> None:
    compiler = find_compiler(cache, "c++ -DNDEBUG")
    assert compiler is not None and compiler.command[1:] == ("-DNDEBUG",)
    assert build([SOURCE], cache, compiler)[0].cached is False


def test_added_flags(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come last, so that they win, and make other artefacts."""
    before = build([SOURCE], cache)[0]
    monkeypatch.setenv("LLMCOMP_CXXFLAGS", "-O1 '-DNAME=\"a b\"'")
    compiler = find_compiler(cache)
    assert compiler is not None and compiler.flags[-2:] == ("-O1", '-DNAME="a b"')
    assert build([SOURCE], cache)[0].path != before.path
    monkeypatch.setenv("LLMCOMP_CXXFLAGS", "--no-such-flag")
    with pytest.raises(BuildError, match="no-such-flag"):
        build([SOURCE], cache)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_folder_that_others_can_write_is_refused(cache: Cache, mode: int) -> None:
    cache.root.mkdir()
    cache.root.chmod(mode)
    with pytest.raises(CacheError, match=rf"only you can write, found mode {mode:o}: .* Run: chmod go-w"):
        build([SOURCE], cache)


def test_folder_of_somebody_else_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    build([SOURCE], cache)
    monkeypatch.setattr(storage.os, "getuid", lambda: 12345)
    os.chown(cache.root, 54321, -1) if os.geteuid() == 0 else None
    with pytest.raises(CacheError, match="belongs to you, found one of user"):
        build([SOURCE], cache)


def test_file_in_place_of_the_folder(cache: Cache) -> None:
    cache.root.write_text("")
    with pytest.raises(CacheError, match="expected a folder .* found a file"):
        build([SOURCE], cache)


def refuse(folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every new file in `folder` fail (the tests may run as root, whom no mode stops)."""
    mkstemp = storage.tempfile.mkstemp

    def failing(dir: Path, prefix: str, suffix: str) -> tuple[int, str]:  # noqa: A002
        if Path(dir) == folder:
            raise error
        return mkstemp(dir=dir, prefix=prefix, suffix=suffix)

    monkeypatch.setattr(storage.tempfile, "mkstemp", failing)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left")])
def test_folder_that_cannot_be_written(cache: Cache, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    (before,) = build([SOURCE], cache)
    refuse(cache.root, error, monkeypatch)
    with pytest.warns(RuntimeWarning, match=rf"cannot write to .*{error.strerror}.*Set LLMCOMP_CACHE") as caught:
        (fresh, old) = build([source("fresh", 7), SOURCE], cache)
    assert len({str(w.message) for w in caught}) == 1
    assert call(fresh) == 7 and fresh.path.parent == storage.overflow_folder()
    assert old.cached and old.path == before.path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build([source("fresh", 7)], cache)[0].cached


def test_nothing_can_be_written(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler(cache)
    refuse(cache.root, OSError(30, "Read-only file system"), monkeypatch)
    storage.overflow_folder().write_text("")  # a file stands in its place
    with pytest.raises(CacheError, match="expected a folder"), pytest.warns(RuntimeWarning):
        build([source("nowhere", 1)], cache, compiler)


def test_overflow_folder_taken_by_somebody_else(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not looked into, and it is an error only where it would be needed."""
    storage.overflow_folder().mkdir()
    storage.overflow_folder().chmod(0o777)
    assert call(build([source("fine", 3)], cache)[0]) == 3
    refuse(cache.root, OSError(30, "Read-only file system"), monkeypatch)
    with pytest.raises(CacheError, match="only you can write"), pytest.warns(RuntimeWarning):
        build([source("needed", 4)], cache)


def test_no_temporary_folder(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler(cache)

    def refuse_all() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", refuse_all)
    with pytest.raises(CacheError, match="No space left on device. Set TMPDIR"):
        build([SOURCE], cache, compiler)


def test_concurrent_processes(cache: Cache) -> None:
    def work() -> None:
        built = build([source(f"k{k}", k) for k in range(4)], cache)
        os._exit(0 if [call(b) for b in built] == [0, 1, 2, 3] else 1)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work) for _ in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert len(list(cache.root.glob("k*.so"))) == 4
    assert not list(cache.root.glob(".*")), "a temporary file was left behind"


def test_interrupted_write_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.write("file", b"data")
    assert not list(cache.root.iterdir())


def test_python_source(cache: Cache) -> None:
    kernel = Source("scale", "triton", "def launch(x):\n    return 2 * x\n", ("%mul",))
    (built,) = build([kernel], cache, None)
    assert built.module().launch(21) == 42
    assert built.path.read_text() == "# %mul\n" + kernel.text
    built.path.write_text("# %mul\ndef launch(x):\n")
    (again,) = build([kernel], cache)
    assert not again.cached and again.module().launch(1) == 2
    assert build([kernel], cache)[0].cached


def test_one_openmp_runtime(cache: Cache) -> None:
    """A library with a parallel region uses the OpenMP runtime that torch has loaded, not one of its own."""
    text = '#include "prelude.h"\nextern "C" int64_t region() {\n    int64_t n = 0;\n'
    text += "#pragma omp parallel num_threads(2) reduction(+ : n)\n    n += 1;\n    return n;\n}\n"
    script = textwrap.dedent(f"""
        import ctypes, re, torch
        from pathlib import Path
        from llmcomp.codegen.build import Source, build
        from llmcomp.codegen.cache import Cache
        (built,) = build([Source("region", "cpp", {text!r})], Cache(Path({str(cache.root)!r})))
        torch.ones(100000).sum()
        assert ctypes.CFUNCTYPE(ctypes.c_int64)(built.function())() == 2
        maps = Path("/proc/self/maps").read_text()
        runtimes = set(re.findall(r"\\S*lib(?:gomp|omp|iomp5)\\S*", maps))
        assert len(runtimes) == 1, runtimes
    """)
    subprocess.run([sys.executable, "-c", script], check=True)

"""Source text -> a file on disk that can be called: compiled once, content-addressed, safe to share and to
interrupt.

A kernel named `norm` becomes `norm_<hash>.cpp` beside `norm_<hash>.so` in the folder of the cache. The hash
covers everything that decides what the library does: text, prelude, compiler, flags, CPU features, versions.
So a file is never updated, only found or made, and a warm start runs no compiler.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from llmcomp.codegen.cache import Cache, seal, sealed, unsealed
from llmcomp.errors import BuildError, CacheError

HEADERS = Path(__file__).parent

# Why these, and what is left out:
#   no -ffast-math        NaN, infinity and signed zeros mean in a kernel what they mean in eager;
# -fno-math-errno, -fno-trapping-math   nobody reads errno or floating point flags, and without them loops
# vectorize; -ffp-contract=off     an operation gives the same bits whatever it is fused with; kernels ask for
# fma by name; -fwrapv               integers wrap around, as in torch.
FLAGS = tuple(
    """-std=c++17 -O3 -shared -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=off -fwrapv
    -fno-exceptions -fno-rtti -w""".split()
)
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


@dataclass(frozen=True)
class Source:
    """The text of one kernel. `name` is the exported symbol; `comment`, the graph nodes, is not hashed."""

    name: str
    language: str  # "cpp" | "triton"
    text: str
    comment: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, what identifies it, and the flags that build a kernel."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """A kernel on disk: the library (or Python module), its source, and whether it was there before."""

    source: Source
    path: Path
    source_path: Path
    cached: bool

    def function(self) -> int:
        """The address of the exported C function; the library stays loaded for the life of the process."""
        try:
            library = ctypes.CDLL(str(self.path))
        except OSError as error:
            raise CacheError(
                f"expected to load {self.path}, found: {error}. If its file system is mounted noexec, "
                "set LLMCOMP_CACHE to a folder on another one."
            ) from error
        address = ctypes.cast(library[self.source.name], ctypes.c_void_p).value
        assert address is not None, self.path
        return address

    def module(self) -> ModuleType:
        """The Python module of a Triton source, executed anew by every call."""
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        assert spec is not None and spec.loader is not None, self.path
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def find_compiler(cache: Cache, cxx: str | None = None) -> Compiler | None:
    """The C++ compiler of this machine: `cxx`, or $CXX, or the first of c++, g++, clang++; None without one
    that works. Flags in $LLMCOMP_CXXFLAGS come after ours, and so win.

    What it is and which flags it takes is asked once and kept in the cache, for as long as its file is
    unchanged.
    """
    wanted = cxx or os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        executable = shutil.which(command[0])
        if executable is not None:
            compiler = _identify(cache, (executable, *command[1:]))
            if compiler is not None:
                added = shlex.split(os.environ.get("LLMCOMP_CXXFLAGS", ""))
                return replace(compiler, flags=(*compiler.flags, *added))
    return None


def _identify(cache: Cache, command: tuple[str, ...]) -> Compiler | None:
    file = Path(command[0]).resolve()
    state = file.stat()
    key = _digest(*command, str(file), str(state.st_size), str(state.st_mtime_ns), *FLAGS, cpu_features())
    known = cache.find(f"compiler_{key}.json", sealed)
    if known is not None:
        version, *flags = json.loads(unsealed(known.read_bytes()))
        return Compiler(command, version, tuple(flags))
    version = _first_line(_run([*command, "--version"]).stdout)
    for candidate in _flag_choices():
        if _works(command, candidate):
            cache.write(f"compiler_{key}.json", seal(json.dumps([version, *candidate]).encode()))
            return Compiler(command, version, candidate)
    return None


PROBE = """#include <stdint.h>
extern "C" double probe(double* x, int64_t n, int64_t threads) {
    double sum = 0;
#pragma omp parallel for simd num_threads(threads) reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += __builtin_exp(x[i]);
    return sum;
}
"""


def _flag_choices() -> Iterator[tuple[str, ...]]:
    """Flags from best to last: a compiler takes the first set that builds the probe."""
    for runtime in openmp_runtimes():
        # The file that torch has loaded, by its name: one OpenMP runtime in the process. No C++ library is
        # needed.
        yield (*FLAGS, NATIVE, "-fopenmp", "-nodefaultlibs", str(runtime), "-lm", "-lc", "-lgcc")
    yield (*FLAGS, NATIVE, "-fopenmp")
    yield (*FLAGS, NATIVE, "-fopenmp-simd")
    yield (*FLAGS, "-fopenmp-simd")


def openmp_runtimes() -> list[Path]:
    """The GNU OpenMP runtimes that this torch ships; its own libraries have loaded one of them by now."""
    package = Path(torch.__file__).parent
    return sorted([*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")])


def _works(command: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether the probe compiles, loads (clang links without an OpenMP runtime, silently) and computes."""
    with _temporary_folder() as folder:
        source, library = folder / "probe.cpp", folder / "probe.so"
        source.write_text(PROBE)
        if _run(compile_command(command, flags, source, library)).returncode != 0:
            return False
        try:
            function = ctypes.CDLL(str(library))["probe"]
        except OSError:
            return False
        function.restype = ctypes.c_double
        zeros = (ctypes.c_double * 3)()
        return bool(function(zeros, ctypes.c_int64(3), ctypes.c_int64(1)) == 3)


def compile_command(command: Sequence[str], flags: Sequence[str], source: Path, library: Path) -> list[str]:
    """The command line that compiles `source`; libraries among the flags come after it."""
    return [*command, f"-I{HEADERS}", str(source), *flags, "-o", str(library)]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown"


@functools.cache
def cpu_features() -> str:
    """What -march=native resolves to depends on this: the model and feature flags of the first processor."""
    fields = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    try:
        with open("/proc/cpuinfo") as file:
            first = itertools.takewhile(str.strip, file)
            lines = [line for line in first if line.split(":")[0].strip() in fields]
    except OSError:
        lines = [platform.processor()]
    return platform.machine() + "".join(lines)


@functools.cache
def _versions(language: str) -> str:
    triton = importlib.metadata.version("triton") if language == "triton" else ""
    return f"torch {torch.__version__} triton {triton}"


def _digest(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def included(text: str) -> list[str]:
    """The texts of our headers that a source includes, directly or through another."""
    names = re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE)
    texts = [(HEADERS / name).read_text() for name in names]
    return texts + [inner for t in texts for inner in included(t)]


def file_stem(source: Source, compiler: Compiler | None) -> str:
    """`<name>_<hash>`, the hash over everything that decides what the artefact does."""
    parts = [source.language, source.name, source.text, _versions(source.language)]
    if source.language == "cpp":
        assert compiler is not None
        parts += [
            *included(source.text),
            *compiler.command,
            compiler.version,
            *compiler.flags,
            cpu_features(),
        ]
    return f"{source.name}_{_digest(*parts)}"


def file_text(source: Source) -> str:
    """What is written to disk: the comment, then the text."""
    mark = "//" if source.language == "cpp" else "#"
    lines = [line.rstrip("\\ ") for text in source.comment for line in text.splitlines()]
    head = "".join(f"{mark} {line}".rstrip() + "\n" for line in lines)
    return (head + source.text).encode("ascii", "backslashreplace").decode()


def build(sources: Sequence[Source], cache: Cache, compiler: Compiler | None = None) -> list[Built]:
    """Every source as a file that can be called, in order; missing ones are compiled in parallel.

    Raises BuildError where a source does not compile or there is no compiler, CacheError where the cache is
    unsafe or nothing can be written.
    """
    if compiler is None and any(s.language == "cpp" for s in sources):
        compiler = find_compiler(cache)
        if compiler is None:
            raise BuildError(
                "expected a C++ compiler ($CXX, c++, g++ or clang++), found none that works. "
                "Install one, for instance with `apt install g++`."
            )
    stems = [file_stem(s, compiler) for s in sources]
    unique = dict(zip(reversed(stems), reversed(sources), strict=True))
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda item: _build(item[1], item[0], cache, compiler), unique.items())
        results = dict(zip(unique, made, strict=True))
    seen: set[str] = set()
    return [_repeated(results[stem], stem, seen) for stem in stems]


def _repeated(built: Built, stem: str, seen: set[str]) -> Built:
    """A source that occurs twice in one call was compiled once."""
    cached = built.cached or stem in seen
    seen.add(stem)
    return replace(built, cached=cached)


def _build(source: Source, stem: str, cache: Cache, compiler: Compiler | None) -> Built:
    if source.language == "triton":
        return _build_module(source, stem, cache)
    assert compiler is not None
    library = cache.find(f"{stem}.so", sealed)
    if library is not None:
        source_path = library.with_suffix(".cpp")
        if not source_path.exists():
            source_path = cache.write(source_path.name, file_text(source).encode())
        return Built(source, library, source_path, cached=True)
    source_path = cache.write(f"{stem}.cpp", file_text(source).encode())
    library = cache.write(f"{stem}.so", seal(_compile(source, source_path, compiler)))
    return Built(source, library, source_path, cached=False)


def _build_module(source: Source, stem: str, cache: Cache) -> Built:
    text = file_text(source).encode()
    expected = source.text.encode("ascii", "backslashreplace")
    path = cache.find(f"{stem}.py", lambda data: data.endswith(expected))
    cached = path is not None
    path = path or cache.write(f"{stem}.py", text)
    return Built(source, path, path, cached)


def _compile(source: Source, source_path: Path, compiler: Compiler) -> bytes:
    with _temporary_folder() as folder:
        library = folder / "kernel.so"
        done = _run(compile_command(compiler.command, compiler.flags, source_path, library))
        if done.returncode != 0 or not library.exists():
            says = done.stderr or f"exit status {done.returncode}, and not a word from the compiler"
            raise BuildError(_failure(source, source_path, compiler, says))
        return library.read_bytes()


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise CacheError(
            f"expected a temporary folder that can be written, found: {error}. Set TMPDIR to one."
        ) from error
    with folder as name:
        yield Path(name)


def _failure(source: Source, source_path: Path, compiler: Compiler, stderr: str) -> str:
    """What a person needs to see: the first errors, the lines around the first one, and the graph nodes."""
    errors = [line for line in stderr.splitlines() if "error" in line][:5] or stderr.splitlines()[-5:]
    found = re.search(rf"{re.escape(source_path.name)}:(\d+):", "\n".join(errors))
    lines = file_text(source).splitlines()
    at = int(found[1]) if found else 0
    around = range(max(at - 4, 0), min(at + 3, len(lines))) if found else range(0)
    excerpt = [f"{'>' if n + 1 == at else ' '} {n + 1:4} | {lines[n]}" for n in around]
    return "\n".join(
        [
            f"expected the generated kernel {source.name} to compile with {compiler.version}, found:",
            *errors,
            *excerpt,
            "computes:",
            *(f"  {line}" for line in source.comment),
            f"The source is {source_path}.",
        ]
    )

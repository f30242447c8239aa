"""Run tests with generated C++ under the address and undefined-behaviour sanitizers of g++.

    python -m tests.sanitize                         the C++ tests and a selection of models
    python -m tests.sanitize tests/test_cpp.py -x    any arguments of pytest

A read or write outside of a tensor, or undefined behaviour, ends the process with a report that names kernel and line.
The sanitizers come with g++; kernels are kept apart from the ordinary ones. This file is also the plugin of pytest that
gives every intermediate result a block of memory of its own.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch.fx import GraphModule

from llmcomp import hostcode
from llmcomp.program import Step
from llmcomp.region import Partition
from llmcomp.storage import Storage
from llmcomp.target import Target

ROOT = Path(__file__).resolve().parent.parent
# Preloaded into Python, and not into the compiler. The C++ library has to come along, since the sanitizers look for it.
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
# The last -O wins: with sanitizers -O3 takes minutes.
COMPILER = """#!/bin/sh
exec env -u LD_PRELOAD g++ "$@" -g1 -Og -fsanitize=address,undefined -fno-sanitize-recover=all
"""
FOLDER = Path(tempfile.gettempdir()) / f"llmcomp-sanitized-{os.getuid()}"
DEFAULT = """tests/test_cpp.py tests/test_cpp_attend.py tests/test_cpp_contract.py tests/test_cpp_expr.py
    tests/test_cpp_plan.py tests/test_backend.py tests/test_bad_input.py tests/test_opinfo.py tests/test_kv_cache.py
    tests/test_models.py tests/test_cpp_packed.py tests/test_dynamic.py tests/test_masked.py tests/test_two_four.py
    tests/test_blocks.py tests/test_quantized_experts.py""".split()
# What looks at the speed or the last bits that -O3 gives, and what takes long in processes of its own.
LEFT_OUT = "vectorize or long_sums or (rms_norm and float64) or minifier"


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """The variables under which the tests run."""
    ours = {
        "CXX": str(compiler()),
        "LD_PRELOAD": " ".join(map(library, LIBRARIES)),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "LLMCOMP_CACHE": str(FOLDER),
    }
    return {**base, **ours}


def compiler() -> Path:
    """The script that calls g++; written once, since kernels are built anew when it changes."""
    path = FOLDER / "sanitizing-g++"
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    if not path.exists() or path.read_text() != COMPILER:
        path.write_text(COMPILER)
        path.chmod(0o755)
    return path


def library(name: str) -> str:
    """The path of a library that g++ ships."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def pytest_configure() -> None:
    """Lay intermediate results apart, as for a GPU: side by side in one block, who leaves his place goes unnoticed."""
    assign = hostcode.assign_storage

    def apart(gm: GraphModule, partition: Partition, steps: Sequence[Step], target: Target) -> Storage:
        return assign(gm, partition, steps, replace(target, name="triton"))

    hostcode.assign_storage = apart


OUTSIDE = """
import ctypes, torch
from pathlib import Path
from llmcomp.codegen.build import Source, build
from llmcomp.codegen.cache import Cache
from llmcomp.options import read_options
text = '#include "prelude.h"\\nextern "C" float outside(const float* x, int64_t n) {{ {body} }}\\n'
(built,) = build([Source("outside", "cpp", text)], Cache(read_options().cache))
x = torch.ones(5)
ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_void_p, ctypes.c_int64)(built.function())(x.data_ptr(), 5)
"""
FAULTS = {"return x[n];": "heap-buffer-overflow", "return float(n << (n + 60));": "shift exponent 65 is too large"}


def check_that_faults_are_found() -> None:
    """Kernels with a fault of each kind end their process. RuntimeError where one does not."""
    for body, report in FAULTS.items():
        command = [sys.executable, "-c", OUTSIDE.format(body=body)]
        run = subprocess.run(
            command, cwd=ROOT, env=environment(os.environ), capture_output=True, text=True, check=False
        )
        if run.returncode == 0 or report not in run.stderr:
            raise RuntimeError(f"expected the sanitizers to find {report!r} in {body!r}, found:\n{run.stderr}")


def main(arguments: Sequence[str]) -> int:
    """Run pytest with `arguments`, or with the default selection; its exit status."""
    check_that_faults_are_found()
    chosen = list(arguments) or [*DEFAULT, "-k", f"not ({LEFT_OUT})"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:faulthandler", "-p", "tests.sanitize", *chosen]
    return subprocess.run(command, cwd=ROOT, env=environment(os.environ), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The launch plan: kernels called in order from one C function, over given buffers and those of the arena."""

import ctypes
import time
from collections.abc import Sequence

import pytest
import sympy
import torch
from expecttest import assert_expected_inline

from llmcomp.codegen.build import Built, build
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp import render
from llmcomp.codegen.cpp_plan import Launch, Slot, render_plan
from llmcomp.codegen.kernel import Axis, Buffer, Check, Compute, Load, Map, Store
from tests.cpp_kernels import axis, size

F32, I64 = torch.float32, torch.int64
AT, N, S, T = axis("i0"), size("n"), size("s0"), size("s1")


def scale(name: str, factor: float) -> Map:
    """z = factor * x."""
    body = (Load("v0", "x", AT, F32), Compute("v1", "mul", ("v0", factor), F32), Store("z", AT, "v1"))
    return Map(name, (Buffer("x", F32), Buffer("z", F32, True)), (N,), (Axis(AT, N),), body)


def gather() -> Map:
    """z[i] = x[index[i]] for an x of four elements."""
    body = (
        Load("v0", "index", AT, I64),
        Check("v1", "v0", sympy.Integer(4), False),
        Load("v2", "x", axis("v1"), F32),
        Store("z", AT, "v2"),
    )
    buffers = (Buffer("index", I64), Buffer("x", F32), Buffer("z", F32, True))
    return Map("gather", buffers, (N,), (Axis(AT, N),), body)


def call(
    plan: Built,
    kernels: Sequence[Built],
    buffers: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    arena: torch.Tensor,
) -> int:
    functions = (ctypes.c_void_p * len(kernels))(*(k.function() for k in kernels))
    pointers = (ctypes.c_void_p * len(buffers))(*(None if b is None else b.data_ptr() for b in buffers))
    values = (ctypes.c_int64 * max(len(sizes), 1))(*sizes)
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_void_p] * 4, ctypes.c_int64)(plan.function())
    return int(function(functions, pointers, values, arena.data_ptr(), 1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


LAUNCHES = (
    Launch("double_it", 1, (0, 1), (S * T,)),
    Launch("triple_it", 0, (1, 2), (S * T,)),
    Launch("double_it", 1, (2, 3), (sympy.Integer(4),)),
)
SLOTS = (Slot(1, sympy.Integer(64)), Slot(2, 4 * S * T + 64))


def test_text() -> None:
    assert_expected_inline(
        render_plan("plan", LAUNCHES, SLOTS, (S, T)).text,
        """\
#include "prelude.h"

extern "C" int64_t plan(void* const* functions, void** p, const int64_t* s, char* arena, int64_t threads) {
    const int64_t s0 = s[0];
    const int64_t s1 = s[1];
    int64_t status = 0;
    p[1] = arena + 64;
    p[2] = arena + (4 * s0 * s1 + 64);
    op::call(&status, functions[1], p[0], p[1], int64_t(s0 * s1), threads);  // double_it
    op::call(&status, functions[0], p[1], p[2], int64_t(s0 * s1), threads);  // triple_it
    op::call(&status, functions[1], p[2], p[3], int64_t(4), threads);  // double_it
    return status;
}
""",
    )


def test_calls_in_order_over_planned_buffers(cache: Cache) -> None:
    kernels = build([render(scale("triple_it", 3)), render(scale("double_it", 2))], cache)
    (plan,) = build([render_plan("plan", LAUNCHES, SLOTS, (S, T))], cache)
    for s, t in [(2, 3), (4, 5)]:
        x, z = torch.randn(s * t), torch.zeros(s * t)
        arena = torch.full((64 + 2 * s * t,), -1.0)
        assert call(plan, kernels, [x, None, None, z], [s, t], arena) == 0
        torch.testing.assert_close(z[:4], 12 * x[:4])
        assert torch.equal(z[4:], torch.zeros(s * t - 4))
        assert torch.equal(arena[16 : 16 + s * t], 2 * x)
        assert torch.equal(arena[16 + s * t : 16 + 2 * s * t], 3 * (2 * x))
        assert (arena[:16] == -1).all() and (arena[16 + 2 * s * t :] == -1).all()


def test_failure_is_returned_and_stops_the_plan(cache: Cache) -> None:
    kernels = build([render(gather()), render(scale("double_it", 2))], cache)
    launches = (Launch("gather", 0, (0, 1, 2), (N,)), Launch("double_it", 1, (2, 3), (N,)))
    (plan,) = build([render_plan("checked_plan", launches, (), (N,))], cache)
    x, y, z, arena = torch.randn(4), torch.zeros(3), torch.zeros(3), torch.zeros(1)
    index = torch.tensor([3, 0, 1])
    assert call(plan, kernels, [index, x, y, z], [3], arena) == 0
    assert torch.equal(z, 2 * x[index])
    before = z.clone()
    assert call(plan, kernels, [torch.tensor([3, 4, 1]), x, y, z], [3], arena) == 1
    assert torch.equal(z, before), "a kernel ran after the one that failed"


def test_no_launches_and_no_symbols(cache: Cache) -> None:
    (plan,) = build([render_plan("empty_plan", (), (), ())], cache)
    assert call(plan, [], [], [], torch.zeros(1)) == 0


def test_launch_costs_nanoseconds(cache: Cache) -> None:
    """Eighty small kernels in one call: far below the 50 microseconds of host time of a whole program."""
    kernels = build([render(scale("double_it", 2))], cache)
    launches = tuple(Launch("double_it", 0, (0, 1), (sympy.Integer(1),)) for _ in range(80))
    (plan,) = build([render_plan("long_plan", launches, (), ())], cache)
    x, z = torch.randn(1), torch.zeros(1)
    functions = (ctypes.c_void_p * 1)(kernels[0].function())
    pointers = (ctypes.c_void_p * 2)(x.data_ptr(), z.data_ptr())
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_void_p] * 4, ctypes.c_int64)(plan.function())
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        function(functions, pointers, None, None, 1)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 20e-6, min(seconds)

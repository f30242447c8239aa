"""Weights with zeros anywhere: packed and back, as kernels read them, and through the compiler."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmcomp
from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.codegen.cpp_packed import expands
from llmcomp.masked import pack, room, unpack
from llmcomp.pairs import NotSparse
from llmcomp.report import GraphReport
from tests.cpp_kernels import Call, Library, sanitize, size
from tests.numerics import assert_no_worse
from tests.quantizable import llama
from tests.test_two_four import compiler, eager_tokens
from tests.two_four_kernels import BF16, masked_linear, scattered_weight
from tests.zeros import pruned

pytestmark = pytest.mark.usefixtures("fresh")

S0 = size("s0")
SHAPES = [(256, 45), (200, 7), (2304, 64), (52, 3)]


@pytest.mark.parametrize("n,k", [(5, 128), (3, 70), (2, 1), (7, 256)])
@pytest.mark.parametrize("zeros", [0.1, 0.9])
def test_packed_and_back(n: int, k: int, zeros: float) -> None:
    weight = scattered_weight(n, k, zeros)
    codes = pack(weight, room(weight))
    assert codes.dtype == torch.uint8 and len(codes) == room(weight)
    assert torch.equal(unpack(codes, n, k), weight)


def test_what_does_not_fit() -> None:
    weight = scattered_weight(64, 512, 0.7)
    with pytest.raises(NotSparse, match="does not fit"):
        pack(torch.ones(64, 512, dtype=BF16), room(weight))


def check(library: Library, k: int, n: int) -> None:
    for rows, threads in ((1, 1), (1, 2), (2, 1), (3, 2), (4, 1), (8, 1), (9, 2), (40, 2)):
        for zeros in (0.3, 0.9):
            weight, x, out = (
                scattered_weight(n, k, zeros),
                torch.randn(rows, k).bfloat16(),
                torch.zeros(rows, n).bfloat16(),
            )
            assert library.call(f"masked_linear_{k}_{n}", [x, pack(weight, room(weight)), out], [rows], threads) == 0
            exact = x.double() @ weight.double().t()
            assert_no_worse(out, exact.to(BF16), exact)


@pytest.mark.parametrize("flags", [("-O0",), ("-O0", "-mno-avx512bf16"), ("-O0", "-mno-avx512f"), ("-O0", "-mno-avx")])
def test_kernels(tmp_path: Path, flags: tuple[str, ...]) -> None:
    shapes = SHAPES if len(flags) == 1 else SHAPES[1:2]
    kernels = [render_contract(masked_linear(S0, k, n)) for k, n in shapes]
    library = Library(kernels, tmp_path, compiler(tmp_path, *flags))
    for k, n in shapes:
        check(library, k, n)


def test_optimized(tmp_path: Path) -> None:
    check(Library([render_contract(masked_linear(S0, 256, 45))], tmp_path), 256, 45)


@pytest.mark.slow
def test_nothing_outside_of_the_buffers_is_read(tmp_path: Path) -> None:
    kernel, weight = masked_linear(S0, 160, 7), scattered_weight(7, 160, 0.1)
    exactly = len(pack(weight, room(weight))) - room(weight) % 4096  # no room but what is promised
    codes = pack(weight, exactly)
    calls = [
        Call(kernel, [torch.randn(rows, 160).bfloat16(), codes, torch.zeros(rows, 7).bfloat16()], [rows])
        for rows in (1, 11)
    ]
    assert sanitize(calls, tmp_path) == ""


# ---- the pass and the compiler --------------------------------------------------------------------------------------


def layer(zeros: float, dtype: torch.dtype = BF16) -> nn.Linear:
    made = nn.Linear(256, 64).to(dtype)
    with torch.no_grad():
        made.weight.copy_(scattered_weight(64, 256, zeros))
    return made.requires_grad_(False)


def test_a_layer_of_few_rows_reads_what_is_not_zero() -> None:
    printed, report, parts = pruned(layer(0.6), (torch.randn(4, 256).to(BF16),), packs=True)
    assert report.rewrites == 1 and len(parts.pieces) == 1 and not report.near_misses
    assert "llmcomp.pack_masked(w0, " in printed and "llmcomp.masked_linear(x0, pack_masked, w1, 64)" in printed


@pytest.mark.parametrize(
    "zeros,dtype,rows,packs,reason",
    [
        (0.6, BF16, 5, True, "5 rows meet them"),
        (0.6, torch.float32, 1, True, "in bfloat16 alone"),
        (0.6, BF16, 1, False, "known to be faster"),
        (0.4, BF16, 1, True, "to skip them costs more"),
    ],
)
def test_where_it_would_not_pay(zeros: float, dtype: torch.dtype, rows: int, packs: bool, reason: str) -> None:
    _, report, _ = pruned(layer(zeros, dtype), (torch.randn(rows, 256).to(dtype),), packs=packs)
    assert report.rewrites == 0 and any(reason in miss.reason for miss in report.near_misses)


def test_what_is_no_smaller_without_zeros_stays() -> None:
    made = nn.Linear(16, 16).to(BF16).requires_grad_(False)
    with torch.no_grad():
        made.weight.copy_(scattered_weight(16, 16, 0.6))
    _, report, _ = pruned(made, (torch.randn(1, 16).to(BF16),), packs=True)
    assert report.rewrites == 0 and not report.savings
    assert any("without zeros it takes 4096 bytes, and 512 as it is" in miss.reason for miss in report.near_misses)


@pytest.mark.skipif(not expands(), reason="kernels read dense weights on this machine")
def test_weights_that_get_more_numbers(graphs: list[GraphReport]) -> None:
    made = layer(0.7)
    compiled, x = torch.compile(made, backend="llmcomp"), torch.randn(1, 256).to(BF16)
    for change in (lambda: None, lambda: made.weight.mul_(2), lambda: made.weight.normal_(0, 0.1)):
        with torch.no_grad():
            change()
            exact: Tensor = nn.functional.linear(x.double(), made.weight.double(), made.bias.double())
            assert_no_worse(compiled(x), made(x), exact)
    assert 1 in [r.report.rewrites for g in graphs for r in g.passes if r.name == "prune"]


@pytest.mark.skipif(not expands(), reason="kernels read dense weights on this machine")
def test_decoding(graphs: list[GraphReport]) -> None:
    """Layers that share an operand, rotated heads and gates: tiles of several matrices, each found by its table."""
    model = llama(spread=0.2).bfloat16()
    llmcomp.prune_(model, "60%")
    tokens = eager_tokens(model)
    model.forward = torch.compile(model.forward, backend="llmcomp")
    assert torch.equal(eager_tokens(model), tokens)
    assert 14 in [r.report.rewrites for g in graphs for r in g.passes if r.name == "prune"]

"""2:4 sparse weights: packed and back, as kernels read them, and through the compiler."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmcomp
from llmcomp.codegen.build import Compiler, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.codegen.cpp_packed import expands
from llmcomp.errors import FormatError, OptionError
from llmcomp.formats import parse_format
from llmcomp.quantized import QuantizedTensor
from llmcomp.report import GraphReport
from llmcomp.two_four import NotTwoFour, is_two_four, pack, unpack
from tests.cpp_kernels import Call, Library, sanitize, size
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.packed_kernels import matrix, packed_buffers, packed_linear
from tests.quantizable import IDS, llama
from tests.two_four_kernels import BF16, sparse_buffers, sparse_linear, two_four_weight
from tests.zeros import pruned

pytestmark = pytest.mark.usefixtures("fresh")

CODED = ["int8_2:4", "int8_g32_2:4", "int4_2:4", "int4_g64_2:4", "int4_g32_2:4", "int4_g32_symmetric_2:4"]
F32 = torch.float32
S0 = size("s0")
SHAPES = [(256, 45), (704, 33), (2304, 64), (52, 3)]


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,k", [(5, 128), (3, 704), (1, 4), (7, 256)])
def test_packed_and_back(n: int, k: int) -> None:
    weight = two_four_weight(n, k)
    codes = pack(weight)
    assert codes.shape == (n, -(-k // 128) * 144) and codes.dtype == torch.uint8
    assert torch.equal(unpack(codes, k), weight)


def test_the_order_of_the_bits() -> None:
    weight = torch.zeros(1, 128, dtype=BF16)
    weight[0, [1, 3, 38]] = torch.tensor([1.0, 2.0, 3.0], dtype=BF16)
    codes = pack(weight)[0]
    masks = [int(m) & 0xFFFFFFFF for m in codes[:16].contiguous().view(torch.int32)]
    assert masks[0] & 15 == 0b1010 and masks[1] >> 6 & 1 == 1  # bit i is column i
    assert all(m.bit_count() == 16 for m in masks)
    values = codes[16:].contiguous().view(BF16)
    assert values[:2].tolist() == [1.0, 2.0] and values[18:20].sum() == 3.0  # two of every group


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("n,k", [(5, 256), (3, 192)])
def test_codes_without_those_of_zeros(name: str, n: int, k: int) -> None:
    form, whole = parse_format(name), parse_format(name.removesuffix("_2:4"))
    assert str(form) == name
    weight = matrix(n, k, form)
    weight[0] = 0
    if not form.group or k % form.group == 0:
        less, all_of_it = form.quantize(weight), whole.quantize(weight)
        numbers = form.dequantize(less, k, F32)
        assert torch.equal(numbers, whole.dequantize(all_of_it, k, F32)) and not bool(numbers[weight == 0].any())
        parts = (all_of_it.codes, all_of_it.scale, all_of_it.zero, str(whole), k)
        made = torch.ops.llmcomp.pack_codes(*parts)
        assert torch.equal(made, less.codes)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert torch.ops.llmcomp.pack_codes(*parts).shape == made.shape
        dense = torch.randn(n, k)
        with pytest.raises(FormatError, match="2:4"):
            form.quantize(dense)


def test_formats_that_are_not_stored_so() -> None:
    for name in ("fp8_2:4", "nf4_2:4", "mxfp4_2:4", "int8_dynamic_2:4"):
        with pytest.raises(OptionError, match="int8 or int4"):
            parse_format(name)


def test_what_is_not_two_four() -> None:
    weight = two_four_weight(4, 128)
    weight[3, 8:11] = 1
    assert not is_two_four(weight) and not is_two_four(torch.zeros(4, 6)) and not is_two_four(torch.zeros(4))
    with pytest.raises(NotTwoFour):
        pack(weight)


# ---- kernels --------------------------------------------------------------------------------------------------------


def compiler(folder: Path, *flags: str) -> Compiler:
    native = find_compiler(Cache(folder))
    assert native is not None
    return replace(native, flags=(*native.flags, *flags))


def check(library: Library, k: int, n: int) -> None:
    for rows, threads in (
        (1, 1),
        (1, 2),
        (2, 1),
        (3, 2),
        (4, 1),
        (8, 1),
        (9, 2),
        (40, 2),
    ):
        buffers, exact = sparse_buffers(rows, k, n)
        assert library.call(f"sparse_linear_{k}_{n}", buffers, [rows], threads) == 0
        assert_no_worse(buffers[-1], exact.to(BF16), exact)


@pytest.mark.parametrize("flags", [("-O0",), ("-O0", "-mno-avx512bf16"), ("-O0", "-mno-avx512f"), ("-O0", "-mno-avx")])
def test_kernels(tmp_path: Path, flags: tuple[str, ...]) -> None:
    shapes = SHAPES if len(flags) == 1 else SHAPES[1:2]
    library = Library(
        [render_contract(sparse_linear(S0, k, n)) for k, n in shapes], tmp_path, compiler(tmp_path, *flags)
    )
    for k, n in shapes:
        check(library, k, n)


def test_optimized(tmp_path: Path) -> None:
    check(Library([render_contract(sparse_linear(S0, 704, 33))], tmp_path), 704, 33)


@pytest.mark.slow
def test_nothing_outside_of_the_buffers_is_read(tmp_path: Path) -> None:
    kernel = sparse_linear(S0, 160, 7)
    calls = [Call(kernel, sparse_buffers(rows, 160, 7)[0], [rows]) for rows in (1, 11)]
    assert sanitize(calls, tmp_path) == ""


def test_codes(tmp_path: Path) -> None:
    shapes = [(name, dtype, k, n) for name in CODED for dtype in (F32, BF16) for k, n in ((256, 45),)]
    shapes += [("int8_2:4", BF16, 52, 3), ("int8_2:4", F32, 2304, 33), ("int4_g32_2:4", BF16, 2208, 64)]
    for flags in (("-O0",), ("-O0", "-mno-avx512vbmi2"), ("-O0", "-mno-avx512f"), ("-O0", "-mno-avx")):
        some = shapes if len(flags) == 1 else shapes[::5]
        kernels = [replace(packed_linear(S0, k, n, parse_format(f), t), name=symbol(f, t, k)) for f, t, k, n in some]
        library = Library([render_contract(kernel) for kernel in kernels], tmp_path, compiler(tmp_path, *flags))
        for f, dtype, k, n in some:
            for rows, threads in ((1, 1), (2, 2), (3, 1), (8, 1), (9, 2), (40, 1)):
                buffers, exact = packed_buffers(rows, k, n, parse_format(f), dtype)
                assert library.call(symbol(f, dtype, k), buffers, [rows], threads) == 0
                if dtype == F32:
                    assert_equal_float32(buffers[-1], exact.float())
                else:
                    assert_no_worse(buffers[-1], exact.to(dtype), exact)


def symbol(name: str, dtype: torch.dtype, k: int) -> str:
    return f"{name}_{dtype}_{k}".replace(":", "_").replace(".", "_")


# ---- the pass and the compiler --------------------------------------------------------------------------------------


def layer(dtype: torch.dtype = BF16) -> nn.Linear:
    made = nn.Linear(256, 64).to(dtype)
    with torch.no_grad():
        made.weight.copy_(two_four_weight(64, 256))
    return made.requires_grad_(False)


def test_a_layer_of_few_rows_reads_packed_weights() -> None:
    made = layer()
    printed, report, parts = pruned(made, (torch.randn(2, 256).to(BF16),), packs=True)
    assert report.rewrites == 1 and len(parts.pieces) == 1 and not report.near_misses
    assert "llmcomp.pack_two_four(w0)" in printed and "llmcomp.two_four_linear(x0, pack_two_four, w1)" in printed


@pytest.mark.parametrize(
    "dtype,rows,packs,reason",
    [
        (BF16, 5, True, "5 rows meet them"),
        (torch.float32, 1, True, "in bfloat16 alone"),
        (BF16, 1, False, "known to be faster"),
    ],
)
def test_where_it_would_not_pay(dtype: torch.dtype, rows: int, packs: bool, reason: str) -> None:
    _, report, _ = pruned(layer(dtype), (torch.randn(rows, 256).to(dtype),), packs=packs)
    assert report.rewrites == 0 and reason in report.near_misses[0].reason


@pytest.mark.parametrize("columns,bytes", [(64, 8192), (72, 9216)])
def test_narrow_matrices_that_are_no_smaller_stay(columns: int, bytes: int) -> None:
    made = nn.Linear(columns, 64, bias=False).to(BF16).requires_grad_(False)
    with torch.no_grad():
        made.weight.copy_(two_four_weight(64, columns))
    _, report, _ = pruned(made, (torch.randn(1, columns).to(BF16),), packs=True)
    assert report.rewrites == 0 and not report.savings
    assert any(f"it takes 9216 bytes, and {bytes} as it is" in miss.reason for miss in report.near_misses)


def quantized(name: str) -> nn.Linear:
    made = layer()
    made.weight = nn.Parameter(QuantizedTensor.quantize(made.weight, parse_format(name)), requires_grad=False)
    return made


def test_codes_of_few_rows_are_read_without_zeros() -> None:
    printed, report, parts = pruned(quantized("int8"), (torch.randn(1, 256).to(BF16),), packs=True)
    assert report.rewrites == 1 and len(parts.pieces) == 1
    assert "llmcomp.pack_codes(" in printed and "'int8_2:4'" in printed


@pytest.mark.parametrize("name,rows,reason", [("int4", 1, "4 bits"), ("int8", 2, "2 rows meet them")])
def test_codes_that_stay(name: str, rows: int, reason: str) -> None:
    _, report, _ = pruned(quantized(name), (torch.randn(rows, 256).to(BF16),), packs=True)
    assert report.rewrites == 0 and reason in report.near_misses[0].reason


def test_narrow_codes_that_are_no_smaller_stay() -> None:
    made = nn.Linear(64, 64, bias=False).to(BF16)
    form, weight = parse_format("int8"), two_four_weight(64, 64).to(BF16)
    made.weight = nn.Parameter(QuantizedTensor.quantize(weight, form), requires_grad=False)
    printed, report, _ = pruned(made, (torch.randn(1, 64).to(BF16),), packs=True)
    assert report.rewrites == 0 and "pack_codes" not in printed
    assert "without zeros it takes 5120 bytes, and 4096 as it is" in report.near_misses[0].reason


def eager_tokens(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=6, do_sample=False)  # type: ignore[operator, no-any-return]


@pytest.mark.skipif(not expands(), reason="kernels read dense weights on this machine")
def test_codes_that_are_no_longer_sparse(graphs: list[GraphReport]) -> None:
    made = quantized("int8")
    compiled, x = torch.compile(made, backend="llmcomp"), torch.randn(1, 256).to(BF16)
    for change in (lambda: None, lambda: made.weight.copy_(torch.randn(64, 256))):
        with torch.no_grad():
            change()
            numbers = made.weight.format.dequantize(made.weight.packed, 256, torch.float64)
            exact = nn.functional.linear(x.double(), numbers, made.bias.double())
            assert_no_worse(compiled(x), made(x), exact)
    assert 1 in [r.report.rewrites for g in graphs for r in g.passes if r.name == "prune"]


@pytest.mark.skipif(not expands(), reason="kernels read dense weights on this machine")
def test_decoding(graphs: list[GraphReport]) -> None:
    model = llama(spread=0.2).bfloat16()
    llmcomp.prune_(model, "2:4")
    tokens = eager_tokens(model)
    model.forward = torch.compile(model.forward, backend="llmcomp")
    assert torch.equal(eager_tokens(model), tokens)
    rewritten = [r.report.rewrites for g in graphs for r in g.passes if r.name == "prune"]
    assert 14 in rewritten


@pytest.mark.skipif(not expands(), reason="kernels read dense weights on this machine")
def test_weights_that_are_no_longer_sparse() -> None:
    made = layer()
    compiled, x = torch.compile(made, backend="llmcomp"), torch.randn(1, 256).to(BF16)
    for change in (lambda: None, lambda: made.weight.mul_(2), lambda: made.weight.normal_(0, 0.1)):
        with torch.no_grad():
            change()
            exact = nn.functional.linear(x.double(), made.weight.double(), made.bias.double())
            assert_no_worse(compiled(x), made(x), exact)

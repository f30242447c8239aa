"""Quantized weights in Triton Contracts: every format, both forms, odd sizes; and what the assembler makes of them."""

from dataclasses import replace

import pytest
import sympy
import torch

from llmcomp.codegen.assemble import assemble
from llmcomp.codegen.build import Source
from llmcomp.codegen.kernel import Accumulator, Buffer, Contract, Packing, Weight
from llmcomp.codegen.triton import render
from llmcomp.dynamic import multiply
from llmcomp.formats import NF4_TABLE, Packed, names, parse_format
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.packed_kernels import packed_buffers, packed_linear, products
from tests.test_assemble import assemblies
from tests.test_triton_contract import gated, qkv
from tests.triton_kernels import load, run
from tests.triton_worker import assembled, interpreted

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
S0 = sympy.Symbol("s0", integer=True, nonnegative=True)


def check(rows: int, k: int, n: int, name: str, dtype: torch.dtype) -> None:
    form = parse_format(name)
    buffers, exact = packed_buffers(rows, k, n, form, dtype)
    run(packed_linear(rows, k, n, form, dtype), buffers)
    if dtype == F32:
        assert_equal_float32(buffers[-1], exact.float())
    else:
        assert_no_worse(buffers[-1], exact.to(dtype), exact)


@interpreted
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("rows", [1, 9])
def test_every_format(name: str, rows: int) -> None:
    check(rows, 256, 20, name, F32)


@interpreted
@pytest.mark.parametrize("name", ["int8", "int8_g32", "int4_g32", "nf4", "int8_dynamic", "fp8_dynamic"])
@pytest.mark.parametrize("rows,k,n", [(3, 64, 7), (20, 192, 40), (2, 1024, 33)])
def test_depths_that_are_no_whole_block(name: str, rows: int, k: int, n: int) -> None:
    check(rows, k, n, name, F32)


@interpreted
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int4_g32_symmetric", "mxfp4", "nf4"])
@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_16_bits(name: str, rows: int, dtype: torch.dtype) -> None:
    check(rows, 512, 24, name, dtype)


@interpreted
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int4_symmetric", "nf4", "mxfp4"])
def test_operands_may_be_large_or_small(name: str) -> None:
    form = parse_format(name)
    for size in (1e-9, 1e9):
        buffers, _ = packed_buffers(1, 256, 8, form, BF16)
        x, codes, scale, *zero, bias, out = buffers
        x *= size
        bias.zero_()
        run(packed_linear(1, 256, 8, form, BF16), buffers)
        exact = products(x, Packed(codes, scale, *zero), form)
        assert_no_worse(out, exact.to(BF16), exact)


@interpreted
@pytest.mark.parametrize("name", ["int8", "fp8", "int8_dynamic", "fp8_dynamic"])
@pytest.mark.parametrize("rows", [2, 6])
def test_rows_of_bytes_that_do_not_lie_as_words(name: str, rows: int) -> None:
    check(rows, 100, 9, name, F32)


@interpreted
@pytest.mark.parametrize("name", ["int8_dynamic", "fp8_dynamic"])
@pytest.mark.parametrize("rows", [4, 9])
def test_tokens_of_zeros_and_such_that_are_not_finite(name: str, rows: int) -> None:
    form = parse_format(name)
    buffers, _ = packed_buffers(rows, 128, 8, form, F32)
    x, codes, scale, bias, out = buffers
    bias.zero_()
    x[0], x[1, 5], x[2, 7], x[3] = 0.0, torch.nan, -torch.inf, x[3] * 1e-38
    run(packed_linear(rows, 128, 8, form, F32), buffers)
    expected = multiply(x, Packed(codes, scale), form)
    assert torch.equal(out[0], torch.zeros(8)) and bool(out[1:3].isnan().all())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-42, equal_nan=True)


def test_a_quotient_is_that_of_a_division() -> None:
    """What `quotient` does on a GPU: products and sums in float64 are exact enough to be fused ones."""
    torch.manual_seed(0)
    peaks = torch.randn(4000, 1).exp() * 2.0 ** torch.randint(-100, 100, (4000, 1))
    x = torch.cat([peaks * torch.randn(4000, 60).clamp(-1, 1), peaks * torch.arange(-127, 128) / 254, peaks], 1)
    scale = (peaks / 127).float()
    inverse, guess = 1 / scale, x * (1 / scale)
    rest = (x.double() - guess.double() * scale.double()).float()
    found = (guess.double() + rest.double() * inverse.double()).float()
    assert torch.equal(found.round(), (x / scale).round())


PERMUTE = """\
import triton
import triton.language as tl
import llmcomp.codegen.triton_codes as codes


@triton.jit
def permute(a_ptr, b_ptr, selector_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, codes.permute(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(selector_ptr + i)))
"""


@interpreted
def test_bytes_are_permuted_as_the_instruction_does_it() -> None:
    a, b = torch.randint(-(2**31), 2**31, (2, 512)).int()
    selector, found = torch.randint(0, 2**16, (512,)).int(), torch.zeros(512, dtype=torch.int32)
    load(Source("permute", "triton", PERMUTE)).permute[(1,)](a, b, selector, found, 512)
    for i, (one, two, nibbles) in enumerate(zip(a.tolist(), b.tolist(), selector.tolist(), strict=True)):
        eight = (one & 0xFFFFFFFF | (two & 0xFFFFFFFF) << 32).to_bytes(8, "little")
        for j in range(4):
            nibble = nibbles >> 4 * j & 15
            byte = eight[nibble & 7]
            assert found[i] >> 8 * j & 255 == (byte if nibble < 8 else 255 * (byte >> 7))


@assembled
def test_bytes_are_permuted_by_one_instruction() -> None:
    function = load(Source("permute", "triton", PERMUTE)).permute
    signature = {"a_ptr": "*i32", "b_ptr": "*i32", "selector_ptr": "*i32", "out_ptr": "*i32", "N": "constexpr"}
    assert assemble(function, signature, {"N": 128}, 90, {"num_warps": 4}).instructions["PRMT"] == 1


def test_codes_of_nf4_stand_for_its_numbers() -> None:
    from llmcomp.codegen.triton_codes import NF4_CODES, NF4_STEP, NF4_ZERO

    numbers = [(code - NF4_ZERO.value) * NF4_STEP.value for code in NF4_CODES]
    assert max(abs(a - b) for a, b in zip(numbers, NF4_TABLE, strict=True)) < 3.2e-5
    assert all(a >> 7 & 1 == b >> 7 & 1 for a, b in zip(NF4_CODES[:8], NF4_CODES[8:], strict=True))


DEEP = 16384  # so that the depth is walked in a loop
# Instructions of a thread for each weight in the loop of a decode kernel. At the memory's pace a H200 has time for 4.0
# for each weight of 4 bits and 7.8 for each of 8.
COUNTS = [
    ("int4", 90, 3.3), ("int4", 80, 3.4), ("int4_g64", 90, 3.6), ("int4_g32_symmetric", 90, 3.5), ("nf4", 90, 6.9),
    ("mxfp4", 90, 5.0),
    ("int8_dynamic", 90, 1.8), ("int8_dynamic", 80, 1.9), ("fp8_dynamic", 90, 5.6),
    ("int8", 90, 4.6), ("int8", 80, 4.8), ("int8_g32", 90, 4.8), ("fp8", 90, 4.9), ("fp8", 80, 5.0),
]  # fmt: skip


@assembled
@pytest.mark.parametrize("name,capability,most", COUNTS)
def test_decode_takes_few_instructions_for_a_weight(name: str, capability: int, most: float) -> None:
    form = parse_format(name)
    kernel = packed_linear(1, DEEP, 2048, form, BF16)
    (one,) = assemblies(kernel, (), capability)
    config = load(render(kernel)).default(())
    weights = config["BLOCK_N"] * config["BLOCK_K"] * (8 if form.bits == 4 else 1) / (32 * config.warps)
    assert weights in (128, 256), "of a thread in a step"
    assert one.loop.total() / weights <= most
    assert one.narrowest_streamed_load == 16
    slow = sum(n for op, n in one.loop.items() if op.startswith("I2F."))
    assert slow <= weights / 32, "conversions run at a quarter of the pace of others: only those of zero points"
    assert one.tensor_core_instructions == 0


@assembled
@pytest.mark.parametrize(
    "name,rows,k,n,capability",
    [("int4", 4, 4096, 4096, 90), ("int4", 2, 896, 128, 80), ("nf4", 4, 2048, 512, 80), ("mxfp4", 1, 2048, 512, 80),
     ("int8", 4, 4096, 4096, 80), ("int8_g64", 1, 896, 128, 90), ("fp8", 4, 2048, 512, 90)],
)  # fmt: skip
def test_decode_streams_codes_in_loads_of_16_bytes(name: str, rows: int, k: int, n: int, capability: int) -> None:
    (one,) = assemblies(packed_linear(rows, k, n, parse_format(name), BF16), (), capability)
    assert one.narrowest_streamed_load == 16
    assert one.tensor_core_instructions == 0


@assembled
@pytest.mark.parametrize(
    "name,dtype",
    [("int4", BF16), ("int4", F16), ("int4_g32_symmetric", BF16), ("nf4", F16), ("mxfp4", BF16), ("int8_g32", F16),
     ("fp8", BF16), ("int8_dynamic", BF16), ("fp8_dynamic", F16)],
)  # fmt: skip
def test_prefill_multiplies_on_tensor_cores(name: str, dtype: torch.dtype) -> None:
    wanted = {"int8_dynamic": ("IMMA", "IGMMA"), "fp8_dynamic": ("HMMA", "QGMMA")}.get(name, ("HMMA", "HGMMA"))
    for capability, instruction in zip((80, 90), wanted, strict=True):
        (one,) = assemblies(packed_linear(S0, 2048, 2048, parse_format(name), dtype), (512,), capability)
        assert any(op.startswith(instruction) for op in one.instructions)
        assert one.widest_load == 16


def with_codes(kernel: Contract, name: str) -> Contract:
    """The kernel with weights of the same shapes in a storage format."""
    form, buffers = parse_format(name), {b.name: b for b in kernel.buffers}
    depth = int(kernel.depth.size)
    one = form.quantize(torch.tensor([1.0, 0, 0, 1]).repeat(1, depth // 4))

    def stored(a: Accumulator) -> Accumulator:
        weight = a.weight.buffer
        parts = {"": one.codes, "_scale": one.scale if form.group else None, "_zero": one.zero}
        names = {part: weight + part for part, tensor in parts.items() if tensor is not None}
        buffers.update({n: Buffer(n, parts[part].dtype) for part, n in names.items()})  # type: ignore[union-attr]
        groups = sympy.Integer(depth // form.group if form.group else 0)
        packing = Packing(form, groups, names.get("_scale"), names.get("_zero"))
        return replace(a, weight=Weight(weight, sympy.Integer(one.codes.shape[1]), sympy.Integer(1), packing=packing))

    sections = tuple(replace(s, accumulators=tuple(map(stored, s.accumulators))) for s in kernel.sections)
    return replace(kernel, buffers=tuple(buffers.values()), sections=sections)


@assembled
@pytest.mark.parametrize("name", ["int4", "int8_dynamic", "int8_2:4", "int4_2:4"])
@pytest.mark.parametrize("capability", [80, 90])
def test_layers_of_a_model(name: str, capability: int) -> None:
    """Norms in front of them, rotated heads and gates behind them, one to many rows."""
    decode = [(with_codes(qkv(1, 2048, 32, 8, 64, BF16, normed), name), ()) for normed in (True, False)]
    gate = with_codes(gated(S0, 2048, 8192, BF16), name)
    for kernel, sizes in [*decode, (gate, (1,)), (gate, (4,))]:
        (one,) = assemblies(kernel, sizes, capability)
        assert one.narrowest_streamed_load == 16
    (one,) = assemblies(gate, (512,), capability)
    assert one.tensor_core_instructions > 0

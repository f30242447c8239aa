"""Weights with zeros in blocks: packed and back, as kernels read them, and through the compiler."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmcomp
from llmcomp.blocks import HEIGHTS, WIDTHS, Blocks, pack, room, unpack
from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.codegen.cpp_packed import skipping
from llmcomp.pairs import NotSparse
from llmcomp.passes.zero_blocks import find_blocks
from llmcomp.report import GraphReport
from tests.cpp_kernels import Call, Library, sanitize, size
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.quantizable import llama
from tests.test_two_four import compiler, eager_tokens
from tests.two_four_kernels import BF16, F32, block_linear, block_weight, two_four_weight
from tests.zeros import pruned

F64 = torch.float64
S0 = size("s0")
SHAPES = [(32, 32, 256, 45), (1, 32, 200, 7), (16, 16, 208, 37), (64, 64, 704, 96), (1, 16, 100, 40), (8, 64, 2304, 64)]


def blocks(height: int, width: int) -> Blocks:
    return Blocks(height=height, width=width)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,k", [(64, 128), (70, 100), (1, 1), (130, 330)])
@pytest.mark.parametrize("dtype", [BF16, F64])
def test_packed_and_back(n: int, k: int, dtype: torch.dtype) -> None:
    for height in HEIGHTS:
        for width in WIDTHS:
            weight = block_weight(n, k, blocks(height, width), 0.6, dtype)
            codes = pack(weight, height, width, room(weight, height, width))
            assert codes.dtype == torch.uint8 and len(codes) == room(weight, height, width)
            assert torch.equal(unpack(codes, dtype, n, k, width), weight)


def test_how_it_lies_in_memory() -> None:
    weight = torch.zeros(4, 96, dtype=BF16)
    weight[0, 0], weight[1, 95], weight[2:, 32:64] = 1, 2, 3
    codes = pack(weight, 2, 32, room(weight, 2, 32))
    table = codes[:80].view(torch.int64).view(5, 2) + 16 * torch.arange(5).unsqueeze(1)
    halves, numbers = codes.view(torch.int16), codes.view(BF16)
    assert table[0, 0] == table[1, 0] and table[2, 0] == table[3, 0] != table[0, 0]
    lists = [halves[at : at + 1 + halves[at]].tolist() for at in (table[0, 0] // 2, table[2, 0] // 2)]
    assert lists == [[2, 0, 2], [1, 1]]
    assert [int(b - a) for a, b in zip(table[:, 1], table[1:, 1], strict=False)] == [128, 128, 64, 64]
    assert table[0, 1] % 64 == 0 and numbers[table[0, 1] // 2] == 1 and numbers[table[2, 1] // 2 - 1] == 2


def test_what_does_not_fit() -> None:
    weight = block_weight(64, 512, blocks(32, 32), 0.7)
    with pytest.raises(NotSparse, match="does not fit"):
        pack(torch.ones(64, 512, dtype=BF16), 32, 32, room(weight, 32, 32))


# ---- kernels --------------------------------------------------------------------------------------------------------


def check(library: Library, form: Blocks, k: int, n: int, dtype: torch.dtype) -> None:
    name = block_linear(S0, k, n, form, dtype).name
    for rows, threads in ((1, 1), (1, 2), (2, 1), (3, 2), (4, 1), (8, 1), (9, 2), (40, 2)):
        for zeros in (0.3, 0.9):
            weight, x = block_weight(n, k, form, zeros, dtype), torch.randn(rows, k).to(dtype)
            codes, out = (
                pack(weight, form.height, form.width, room(weight, form.height, form.width)),
                x.new_zeros(rows, n),
            )
            assert library.call(name, [x, codes, out], [rows], threads) == 0
            exact = x.double() @ weight.double().t()
            if dtype == F32:
                assert_equal_float32(out, exact.float())
            else:
                assert_no_worse(out, exact.to(dtype), exact)


@pytest.mark.parametrize("flags", [("-O0",), ("-O0", "-mno-avx512bf16"), ("-O0", "-mno-avx512f"), ("-O0", "-mno-avx")])
def test_kernels(tmp_path: Path, flags: tuple[str, ...]) -> None:
    shapes = [(blocks(h, w), k, n, dtype) for h, w, k, n in SHAPES for dtype in (BF16, F32)]
    shapes = shapes if len(flags) == 1 else shapes[2:6]
    kernels = [render_contract(block_linear(S0, k, n, form, dtype)) for form, k, n, dtype in shapes]
    library = Library(kernels, tmp_path, compiler(tmp_path, *flags))
    for form, k, n, dtype in shapes:
        check(library, form, k, n, dtype)


@pytest.mark.parametrize("form", [blocks(16, 16), blocks(1, 32)])
def test_optimized(tmp_path: Path, form: Blocks) -> None:
    check(Library([render_contract(block_linear(S0, 256, 45, form))], tmp_path), form, 256, 45, BF16)


@pytest.mark.slow
@pytest.mark.parametrize("form", [blocks(16, 16), blocks(1, 32)])
def test_nothing_outside_of_the_buffers_is_read(tmp_path: Path, form: Blocks) -> None:
    kernel, weight = block_linear(S0, 160, 7, form), block_weight(7, 160, form, 0.3)
    codes = pack(weight, form.height, form.width, room(weight, form.height, form.width))
    end = int((codes != 0).nonzero()[-1]) // 64 * 64 + 128  # no room but what is promised
    codes = pack(weight, form.height, form.width, end)
    calls = [
        Call(kernel, [torch.randn(rows, 160).bfloat16(), codes, torch.zeros(rows, 7).bfloat16()], [rows])
        for rows in (1, 2, 11, 40)
    ]
    assert sanitize(calls, tmp_path) == ""


# ---- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [blocks(h, w) for h in (1, 16, 32, 64) for w in WIDTHS])
def test_blocks_are_found_as_they_were_made(form: Blocks) -> None:
    found = find_blocks(block_weight(256, 512, form, 0.5))
    assert found is not None and found.form == form and abs(found.zeros - 0.5) < 0.2


def test_other_zeros_within_blocks_do_not_hide_them() -> None:
    weight = block_weight(256, 512, blocks(32, 32), 0.5) * (torch.rand(256, 512) > 0.2)
    found = find_blocks(weight)
    assert found is not None and found.form == blocks(32, 32)
    assert find_blocks(torch.randn(256, 512) * (torch.rand(256, 512) > 0.5)) is None
    assert find_blocks(two_four_weight(256, 512)) is None


# ---- the pass and the compiler --------------------------------------------------------------------------------------


def evenly(form: Blocks, zeros: float) -> Tensor:
    """A mask (256, 512) that leaves no row and no column of blocks without any."""
    i, j = torch.arange(256 // form.height).unsqueeze(1), torch.arange(512 // form.width)
    stays = (7 * i + 3 * j) % 20 >= 20 * zeros
    return stays.repeat_interleave(form.height, 0).repeat_interleave(form.width, 1)


def layer(form: Blocks, zeros: float, dtype: torch.dtype = BF16) -> nn.Linear:
    made = nn.Linear(512, 256).to(dtype)
    with torch.no_grad():
        made.weight.mul_(evenly(form, zeros))
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_a_layer_reads_the_blocks_that_hold_something(rows: int, dtype: torch.dtype) -> None:
    made = layer(blocks(32, 32), 0.6, dtype)
    printed, report, parts = pruned(made, (torch.randn(rows, 512).to(dtype),), packs=True)
    bytes = room(made.weight, 32, 32)
    assert len(parts.pieces) == 1 and not report.near_misses
    assert printed == (
        f"pack_blocks: u8[{bytes}] = llmcomp.pack_blocks(w0, 32, 32, {bytes})\n"
        f"block_linear: {'bf16' if dtype == BF16 else 'f32'}[{rows}, 256] = "
        "llmcomp.block_linear(x0, pack_blocks, w1, 256, 32, 32)\n"
        "return (block_linear)"
    )
    (saving,) = report.savings
    weights = made.weight.numel()
    assert saving.weight_bytes == weights * dtype.itemsize - bytes
    share = float((made.weight == 0).float().mean())
    assert (
        saving.flops == pytest.approx(2 * rows * weights * share, rel=0.2) and saving.flops < 2 * rows * weights * share
    )


@pytest.mark.parametrize(
    "form,zeros,dtype,rows,packs,reason",
    [
        (blocks(32, 32), 0.35, BF16, 8, True, "8 rows meet them, for which below 40% that is faster"),
        (blocks(1, 32), 0.5, BF16, 40, True, "40 rows meet them, for which below 70%"),
        (blocks(32, 32), 0.6, torch.float16, 1, True, "bfloat16 and float32"),
        (blocks(1, 32), 0.5, F32, 4, True, "4 rows meet them, for which below 65%"),
        (blocks(32, 32), 0.6, BF16, 1, False, "known to be faster"),
    ],
)
def test_where_it_would_not_pay(
    form: Blocks, zeros: float, dtype: torch.dtype, rows: int, packs: bool, reason: str
) -> None:
    _, report, _ = pruned(layer(form, zeros, dtype), (torch.randn(rows, 512).to(dtype),), packs=packs)
    assert report.rewrites == 0 and "blocks of" in report.near_misses[0].reason
    assert reason in report.near_misses[0].reason


def test_what_is_no_smaller_in_blocks_stays() -> None:
    made = nn.Linear(64, 16).to(BF16).requires_grad_(False)
    with torch.no_grad():
        made.weight[:, :32] = 0
        made.weight[:8] = made.weight[:8].roll(32, 1)
    _, report, _ = pruned(made, (torch.randn(1, 64).to(BF16),), skips=2**31)
    assert report.rewrites == 0
    assert "without zeros it takes 4096 bytes, and 2048 as it is" in report.near_misses[0].reason


def test_machines_whose_library_multiplies_many_rows_faster() -> None:
    for rows, packed in ((1, True), (16, True), (17, False)):
        printed, report, _ = pruned(layer(blocks(32, 32), 0.6), (torch.randn(rows, 512).to(BF16),), skips=16)
        assert ("llmcomp.block_linear" in printed) is packed
        assert packed or "17 rows meet them, and above 16" in report.near_misses[0].reason


def test_what_takes_fewer_bytes_wins() -> None:
    made = layer(blocks(32, 32), 0.5)
    with torch.no_grad():
        made.weight.mul_(torch.rand(256, 512) > 0.7)  # a few numbers in every block
    printed, _, _ = pruned(made, (torch.randn(1, 512).to(BF16),), packs=True)
    assert "llmcomp.masked_linear" in printed


class Masking(nn.Module):
    """weight * mask, the mask a parameter or a buffer."""

    def __init__(self, mask: Tensor, learned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(mask.shape).to(BF16), requires_grad=learned)
        self.mask: Tensor
        if learned:
            self.mask = nn.Parameter(mask.to(BF16))
        else:
            self.register_buffer("mask", mask.to(BF16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask)


@pytest.mark.parametrize("learned", [False, True])
def test_masks(learned: bool) -> None:
    mask = evenly(blocks(32, 32), 0.6)
    with torch.no_grad():
        printed, report, _ = pruned(Masking(mask, learned), (torch.randn(2, 512).to(BF16),), packs=True)
    assert ("llmcomp.block_linear" in printed) is not learned
    assert any("requires grad" in miss.reason for miss in report.near_misses) is learned


@pytest.mark.parametrize("form", [blocks(16, 16), blocks(64, 64), blocks(1, 32)])
def test_the_masked_product_in_float64(form: Blocks) -> None:
    weight, x, bias = block_weight(70, 300, form, 0.5, F64), torch.randn(3, 300, dtype=F64), torch.randn(70, dtype=F64)
    codes = torch.ops.llmcomp.pack_blocks(weight, form.height, form.width, room(weight, form.height, form.width))
    product = torch.ops.llmcomp.block_linear(x, codes, bias, 70, form.height, form.width)
    assert torch.equal(product, nn.functional.linear(x, weight, bias))


@pytest.mark.skipif(not skipping(), reason="kernels read dense weights on this machine")
def test_weights_that_get_more_numbers(graphs: list[GraphReport]) -> None:
    made = layer(blocks(32, 32), 0.7)
    compiled, x = torch.compile(made, backend="llmcomp"), torch.randn(1, 512).to(BF16)
    for change in (lambda: None, lambda: made.weight.mul_(2), lambda: made.weight.normal_(0, 0.1)):
        with torch.no_grad():
            change()
            exact: Tensor = nn.functional.linear(x.double(), made.weight.double(), made.bias.double())
            assert_no_worse(compiled(x), made(x), exact)
    assert 1 in [r.report.rewrites for g in graphs for r in g.passes if r.name == "prune"]


@pytest.mark.skipif(not skipping(), reason="kernels read dense weights on this machine")
def test_decoding(graphs: list[GraphReport]) -> None:
    """Prompt and steps: layers that share an operand, rotated heads and gates, whose tiles begin in other blocks."""
    model = llama(spread=0.2).bfloat16()
    llmcomp.prune_(model, llmcomp.Block(0.5, 16, 16))
    tokens = eager_tokens(model)
    model.forward = torch.compile(model.forward, backend="llmcomp")
    assert torch.equal(eager_tokens(model), tokens)
    assert 14 in [r.report.rewrites for g in graphs for r in g.passes if r.name == "prune"]

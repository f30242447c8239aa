"""Storage formats: the arithmetic each docstring states, names, what is refused, and the layout of 4-bit codes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcomp.errors import FormatError, OptionError
from llmcomp.formats import (
    E2M1_TABLE,
    NF4_TABLE,
    Format,
    Fp8,
    Int4,
    Int8,
    Mxfp4,
    Nf4,
    Packed,
    bits_per_weight,
    names,
    packed_bytes,
    parse_format,
    scale_of,
)
from llmcomp.nibbles import pack, unpack

EVERY = pytest.mark.parametrize("name", names())


def weights(rows: int = 12, columns: int = 256) -> torch.Tensor:
    weight = torch.randn(rows, columns) * 0.02
    weight[3] = 0
    weight[5, :128] = 0
    return weight


@given(st.integers(1, 3), st.integers(1, 300))
def test_nibbles_come_back(rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (rows, -(-columns // 128) * 64)
    assert torch.equal(unpack(packed, columns), codes)


def test_bytes_unpack_in_the_order_of_the_codes() -> None:
    codes = torch.randint(0, 16, (256,), dtype=torch.uint8)
    for block, data in zip(codes.view(2, 128), pack(codes).view(2, 64), strict=True):
        assert torch.equal(data & 15, block[:64]) and torch.equal(data >> 4, block[64:])


@EVERY
def test_names_are_read_back(name: str) -> None:
    form = parse_format(name)
    assert str(form) == name
    assert hash(form) == hash(parse_format(name))


@EVERY
def test_every_weight_becomes_the_nearest_number(name: str) -> None:
    form, weight = parse_format(name), weights()
    packed = form.quantize(weight)
    got = form.dequantize(packed, 256, torch.float32)
    assert torch.equal(got[3], torch.zeros(256)) and torch.equal(got[5, :128], torch.zeros(128))
    group = form.group or 256
    parts, results = weight.reshape(-1, group), got.reshape(-1, group)
    for wanted, found, numbers in zip(parts, results, every_number(form, packed), strict=True):
        nearest = (wanted[:, None] - numbers[None, :]).abs().amin(1)
        assert bool(((wanted - found).abs() <= nearest * (1 + 1e-5) + 1e-9).all())


def every_number(form: Format, packed: Packed) -> torch.Tensor:
    """The numbers that each group can hold, (groups, codes)."""
    scale = scale_of(packed.scale).reshape(-1, 1)
    if isinstance(form, Int8):
        return torch.arange(-127, 128)[None] * scale
    if isinstance(form, Fp8):
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return every[~every.isnan()][None] * scale
    zero = 0 if packed.zero is None else packed.zero.reshape(-1, 1).float()
    return (torch.tensor(form.table)[None] - zero) * scale


@EVERY
def test_what_is_packed_quantizes_to_itself(name: str) -> None:
    form = parse_format(name)
    once = form.dequantize(form.quantize(weights()), 256, torch.float32)
    twice = form.dequantize(form.quantize(once), 256, torch.float32)
    limit = 1e-5 if not form.group or name == "mxfp4" else 0.03  # the scale of a group is rounded to bfloat16
    assert float((twice - once).norm()) <= limit * float(once.norm())


@pytest.mark.parametrize(
    "name,error",
    [("int8", 0.008), ("fp8", 0.03), ("int4_g32", 0.09), ("int4", 0.11), ("nf4", 0.1), ("mxfp4", 0.13)],
)
def test_error_on_normal_weights(name: str, error: float) -> None:
    form, weight = parse_format(name), torch.randn(64, 256)
    got = form.dequantize(form.quantize(weight), 256, torch.float32)
    relative = float((got - weight).norm() / weight.norm())
    assert error / 2 < relative < error


@EVERY
def test_large_matrices_are_quantized_piece_by_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, weight = parse_format(name), weights()
    whole = form.quantize(weight)
    monkeypatch.setattr("llmcomp.formats.AT_ONCE", 5 * 256)
    pieces = form.quantize(weight)
    for part in ("codes", "scale", "zero"):
        one, other = getattr(whole, part), getattr(pieces, part)
        assert one is None and other is None or torch.equal(one.float(), other.float())


def test_int8_by_hand() -> None:
    packed = Int8().quantize(torch.tensor([[1.27, -0.635, 0.005, 0.0149]]))
    assert packed.codes.tolist() == [[127, -64, 0, 1]]  # 63.5 is a tie: the even code
    assert packed.scale.tolist() == pytest.approx([0.01])


def test_int4_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([-1.0, 2.0, 0.4, -0.2])
    packed = Int4(32).quantize(weight)
    assert packed.scale.item() == pytest.approx(0.2, rel=1e-2)
    assert packed.zero is not None and packed.zero.item() == 5
    assert unpack(packed.codes, 32)[0, :5].tolist() == [0, 15, 7, 4, 5]
    symmetric = Int4(32, symmetric=True).quantize(weight)
    assert symmetric.zero is None and symmetric.scale.item() == -0.25  # the largest, 2.0, has code 0
    assert unpack(symmetric.codes, 32)[0, :5].tolist() == [12, 0, 6, 9, 8]


def test_tables() -> None:
    for form, table in ((Nf4(32), NF4_TABLE), (Mxfp4(), E2M1_TABLE)):
        assert form.table == table and len(table) == 16
        weight = torch.tensor([*table, *table])[None]
        assert torch.equal(form.dequantize(form.quantize(weight), 32, torch.float32), weight)
    assert float(scale_of(torch.tensor(126, dtype=torch.uint8))) == 0.5


def test_fp8_keeps_its_largest_number() -> None:
    packed = Fp8().quantize(torch.tensor([[448.0, -224.0, 1.0]]))
    assert packed.codes.float().tolist() == [[448.0, -224.0, 1.0]]


@pytest.mark.parametrize("rows,columns", [(12, 256), (3, 128), (1, 384), (5, 1408), (3, 100)])
def test_bytes_are_counted(rows: int, columns: int) -> None:
    plain = [parse_format(name) for name in names()]
    sparse = [replace(f, two_four=True) for f in plain if isinstance(f, Int8 | Int4) and not f.dynamic]
    weight = torch.randn(rows, columns) * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(columns // 4)
    for form in (f for f in (*plain, *sparse) if not f.group or columns % f.group == 0):
        packed = form.quantize(weight)
        size = sum(t.nbytes for t in (packed.codes, packed.scale, packed.zero) if t is not None)
        assert packed_bytes(form, weight.shape) == size, form
        assert bits_per_weight(form, weight.shape) == 8 * size / weight.numel()


@pytest.mark.parametrize("name", ["int3", "int4_g7", "int8_symmetric", "fp8_g32", "", "INT4"])
def test_unknown_names_list_the_valid_ones(name: str) -> None:
    with pytest.raises(OptionError, match="group" if "_g" in name else "int4"):
        parse_format(name)


@pytest.mark.parametrize("name", ["int4_dynamic", "int8_g32_dynamic", "nf4_dynamic", "mxfp4_dynamic"])
def test_what_can_not_be_dynamic(name: str) -> None:
    with pytest.raises(OptionError, match="a scale for each row"):
        parse_format(name)


def test_dynamic_formats_store_what_the_others_store() -> None:
    weight = weights()
    for dynamic, plain in ((Int8(dynamic=True), Int8()), (Fp8(dynamic=True), Fp8())):
        assert dynamic != plain
        one, other = dynamic.quantize(weight), plain.quantize(weight)
        assert torch.equal(one.codes.float(), other.codes.float()) and torch.equal(one.scale, other.scale)
    with pytest.raises(FormatError, match="at most 133144 inputs"):
        Int8(dynamic=True).quantize(torch.ones(1, 133145))


@pytest.mark.parametrize(
    "weight,says",
    [
        (torch.ones(2, 100), "multiple of the group"),
        (torch.ones(4), "float matrix"),
        (torch.ones(4, 128, dtype=torch.int32), "float matrix"),
        (torch.ones(0, 128), "float matrix"),
        (torch.full((1, 128), float("nan")), "finite"),
        (torch.full((1, 128), float("inf")), "finite"),
    ],
)
def test_what_can_not_be_held_is_refused(weight: torch.Tensor, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        Int4().quantize(weight)

"""The search of launch configurations, with an injected timer; results in the cache folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from llmcomp.codegen.build import Source
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.launch import (
    Config,
    Heads,
    Points,
    Product,
    Table,
    decode_config,
    decode_configs,
    dot_config,
    dot_configs,
    gemv_config,
    gemv_configs,
    map_config,
    power,
    prefill_config,
    prefill_configs,
    rows_config,
    splits,
)
from llmcomp.codegen.tune import Tuning, find, keep, search, shape_class

CANDIDATES = tuple(Config((("BLOCK", block),)) for block in (128, 256, 512, 1024))
SECONDS = {128: 4.0, 256: 2.0, 512: 1.0, 1024: 3.0}
SOURCE = Source("kernel", "triton", "text")


class FakeGpu:
    """Launches take the time that SECONDS says, and pass it on a clock."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.now = 0.0
        self.failing = failing
        self.block = 0
        self.launched: list[int] = []

    def launch(self, config: Config) -> None:
        self.block = config["BLOCK"]
        self.launched.append(self.block)
        if self.block in self.failing:
            raise triton.OutOfResources(2, 1, "shared memory")

    def timer(self, launch: Callable[[], None]) -> float:
        launch()
        self.now += 10 * SECONDS[self.block]
        return SECONDS[self.block]

    def clock(self) -> float:
        return self.now


def test_search_takes_the_fastest() -> None:
    gpu = FakeGpu()
    found = search(CANDIDATES, gpu.launch, gpu.timer, budget=1000.0, clock=gpu.clock)
    assert found == Tuning(CANDIDATES[2], 1.0, 4, 4)


def test_search_stops_when_the_time_is_up() -> None:
    gpu = FakeGpu()
    found = search(CANDIDATES, gpu.launch, gpu.timer, budget=45.0, clock=gpu.clock)
    assert found is not None and found.config == CANDIDATES[1] and found.timed == 2
    assert gpu.launched == [128, 256]
    assert search(CANDIDATES, gpu.launch, gpu.timer, budget=0.0, clock=gpu.clock) is None


def test_search_passes_over_what_does_not_fit() -> None:
    gpu = FakeGpu(failing=(256, 512))
    found = search(CANDIDATES, gpu.launch, gpu.timer, budget=1000.0, clock=gpu.clock)
    assert found is not None and found.config == CANDIDATES[3] and found.timed == 2
    gpu = FakeGpu(failing=(128, 256, 512, 1024))
    assert search(CANDIDATES, gpu.launch, gpu.timer, budget=1000.0, clock=gpu.clock) is None


def test_search_lets_other_errors_pass() -> None:
    def wrong(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(CANDIDATES, wrong, FakeGpu().timer, budget=1.0)


EIGHT = shape_class((5,), CANDIDATES[0])


def test_what_was_kept_is_found_for_its_device_and_class(tmp_path: Path) -> None:
    cache, kept = Cache(tmp_path), replace(CANDIDATES[1], stages=3, form="dot", registers=128)
    keep(SOURCE, EIGHT, cache, "H100", kept)
    assert find(SOURCE, shape_class((8,), CANDIDATES[0]), cache, "H100") == kept
    assert find(SOURCE, shape_class((9,), CANDIDATES[0]), cache, "H100") is None
    assert find(SOURCE, shape_class((8,), CANDIDATES[1]), cache, "H100") is None
    assert find(SOURCE, EIGHT, cache, "A100") is None
    (record,) = [json.loads(p.read_text()) for p in tmp_path.glob("tuned_kernel_*.json")]
    assert (record["device"], record["shape"]) == ("H100", "8")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"blocks": 3}', b'{"blocks": {"A": "x"}}'])
def test_a_damaged_result_is_none(tmp_path: Path, damage: bytes) -> None:
    cache = Cache(tmp_path)
    keep(SOURCE, EIGHT, cache, "H100", CANDIDATES[0])
    (path,) = tmp_path.glob("tuned_*.json")
    assert find(SOURCE, EIGHT, cache, "H100") == CANDIDATES[0]
    path.write_bytes(damage)
    assert find(SOURCE, EIGHT, cache, "H100") is None


def test_another_text_has_another_result(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keep(SOURCE, EIGHT, cache, "H100", CANDIDATES[0])
    assert find(Source("kernel", "triton", "other text"), EIGHT, cache, "H100") is None


def test_shape_class() -> None:
    assert str(shape_class((5, 2048, 0), CANDIDATES[0])) == "8-2048-1"


def test_shapes_of_a_class_can_share_a_configuration() -> None:
    """15 and 24 rows of a group of three heads: 5 and 8 queries are one power of two, the rows are not."""
    few, more = Heads(2, 3, 5, 100, 64), Heads(2, 3, 8, 100, 64)
    assert shape_class(few, decode_config(few)) != shape_class(more, decode_config(more))
    longer = Heads(2, 3, 5, 120, 64)
    assert shape_class(few, decode_config(few)) == shape_class(longer, decode_config(longer))


# ---- defaults -----------------------------------------------------------------------------------------

PRODUCTS = [
    Product(rows, columns, depth, parts, width, size, experts)
    for rows in (1, 3, 4, 7, 40, 512)
    for columns, depth in ((2048, 2048), (50257, 768), (4096, 11008), (6144, 100))
    for parts, width in ((1, 0), (2, 0), (2, 64))
    for size in (2, 4)
    for experts in (1, 8)
]


@pytest.mark.parametrize("config,configs", [(gemv_config, gemv_configs), (dot_config, dot_configs)])
def test_contract_configurations_divide_the_depth(
    config: Callable[[Product], Config], configs: Callable[[Product], tuple[Config, ...]]
) -> None:
    for shape in PRODUCTS:
        for c in (config(shape), *configs(shape)):
            assert shape.depth % 64 or shape.depth % c["BLOCK_K"] == 0, (shape, c)
            assert all(power(n) == n for _, n in c.blocks), (shape, c)
            assert c["BLOCK_N"] <= 128
            assert c["BLOCK_N"] == shape.width or not shape.width
            assert config is gemv_config or min(n for _, n in c.blocks) >= 16


def test_decode_of_a_wide_layer_fills_the_gpu() -> None:
    shape = Product(1, 4096, 4096)
    assert shape.columns // gemv_config(shape)["BLOCK_N"] >= 4 * 132


def test_defaults_follow_the_shape() -> None:
    assert map_config(Points(2048))["BLOCK"] < map_config(Points(2**22))["BLOCK"]
    assert rows_config(Table(4096, 64))["ROWS"] > rows_config(Table(4, 64))["ROWS"] == 1
    assert dot_config(Product(16, 2048, 2048))["BLOCK_M"] == 16
    assert dot_config(Product(4096, 2048, 2048))["BLOCK_M"] == 128
    assert dict(dot_config(Product(512, 3072, 768)).blocks)["BLOCK_N"] == 128
    assert dict(dot_config(Product(512, 3072, 768, room=32)).blocks)["BLOCK_N"] == 64, "its epilogue takes registers"
    long, short = Heads(8, 4, 512, 512, 64), Heads(8, 4, 20, 20, 64)
    assert prefill_config(long)["BLOCK_M"] > prefill_config(short)["BLOCK_M"]
    assert decode_config(Heads(8, 4, 1, 4096, 64))["BLOCK_M"] == 16
    assert len(prefill_configs(long)) >= 8 and len(decode_configs(long)) >= 8


def test_few_heads_and_a_long_context_split_the_keys() -> None:
    import torch

    cpu = torch.device("cpu")
    assert splits(Heads(1, 8, 1, 100_000, 64), 64, cpu) == 128
    assert splits(Heads(8, 4, 1, 4096, 64), 64, cpu) == 32
    assert splits(Heads(8, 4, 1, 100, 64), 64, cpu) == 1
    assert splits(Heads(512, 4, 1, 4096, 64), 64, cpu) == 1

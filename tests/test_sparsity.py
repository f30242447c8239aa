"""llmcomp/sparsity.py: what can be asked for, and what can't."""

from collections.abc import Callable

import pytest

from llmcomp.errors import OptionError
from llmcomp.sparsity import NM, Block, Magnitude, Movement, SparseGPT, Sparsity, Structured, Wanda, parse_sparsity


def test_names() -> None:
    assert parse_sparsity("2:4") == NM(2, 4) and parse_sparsity("4:8") == NM(4, 8)
    assert parse_sparsity("37.5%") == Magnitude(0.375)
    for name in ("24", "2:4:8", "0.5", "150%", "4:4", "0:4"):
        with pytest.raises(OptionError, match="expected"):
            parse_sparsity(name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Magnitude(1.0),
        lambda: Magnitude(-0.1),
        lambda: Magnitude(0.5, "layer"),
        lambda: Wanda(2),
        lambda: SparseGPT(True),
        lambda: SparseGPT(0.5, damping="x"),  # type: ignore[arg-type]
        lambda: SparseGPT(0.5, damping=-1),
        lambda: SparseGPT(0.5, damping=float("nan")),
        lambda: Movement(float("nan")),
        lambda: NM(4, 4),
        lambda: NM(2, 4, "taylor"),
        lambda: NM(2.0, 4),  # type: ignore[arg-type]
        lambda: Block(1.0),
        lambda: Block(0.5, 0),
        lambda: Block(0.5, 32, 1.5),  # type: ignore[arg-type]
        lambda: Structured(),
        lambda: Structured(channels=1.0),
        lambda: Structured(heads=-1),
        lambda: Structured(layers=0.5),  # type: ignore[arg-type]
        lambda: Structured(channels=0.5, criterion="wanda"),
    ],
)
def test_refusals(make: Callable[[], Sparsity]) -> None:
    with pytest.raises(OptionError, match="expected"):
        make()


def test_who_needs_data() -> None:
    assert not any(x.needs_data for x in (Magnitude(), NM(), Structured(layers=1)))
    assert all(x.needs_data for x in (Wanda(), SparseGPT(), NM(criterion="wanda"), Structured(1, criterion="taylor")))

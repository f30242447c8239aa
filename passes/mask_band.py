"""Bands: masks in which query i sees the keys from i - below to i + above, as llmcomp::attention takes them.

i - j >= 0                       above 0             causal
i - j + p >= 0, j - i + 2 >= 0   above p, below 2    causal at offset p, window p + 3
2 - i + j >= 0, 2 + i - j >= 0   above 2, below 2    window 3 to both sides
"""

from dataclasses import dataclass, replace

from llmcomp.graph import Size, same_size
from llmcomp.passes.positions import KEY, QUERY, ZERO, Affine, Index, Terms, constant, known_true
from llmcomp.passes.sizes import writable


@dataclass(frozen=True)
class Band:
    """Query i sees the keys from i - below to i + above; None is no limit."""

    above: Size | None = None
    below: Size | None = None


FULL = Band()
CAUSAL = Band(above=0)


@dataclass(frozen=True)
class Shape:
    """Sizes of the scores."""

    batch: Size
    heads: Size
    queries: Size
    keys: Size

    @property
    def index(self) -> Index:
        """The positions of a score; the only query, where there is one, is the first."""
        return (None, None, ZERO if same_size(self.queries, 1) else QUERY, KEY)


def narrow(band: Band, terms: Terms | None, shape: Shape) -> Band | None:
    """What the conjunction `terms` leaves of `band`, or None where it is unknown or no band of fixed width."""
    if terms is None:
        return None
    for term in terms:
        slopes = (-term.key, term.key) if same_size(shape.queries, 1) else (term.query, term.key)
        if _holds_everywhere(term, shape):
            continue
        if slopes == (1, -1) and (above := _smaller(band.above, term.rest)) is not None:
            band = replace(band, above=above)
        elif slopes == (-1, 1) and (below := _smaller(band.below, term.rest)) is not None:
            band = replace(band, below=below)
        else:
            return None
    return None if arguments(band, shape) is None else band


def _smaller(a: Size | None, b: Size) -> Size | None:
    if a is None or known_true(b <= a):
        return b
    return a if known_true(a <= b) else None


def _holds_everywhere(term: Affine, shape: Shape) -> bool:
    least = term.rest
    for slope, size in ((term.query, shape.queries), (term.key, shape.keys)):
        least = least + slope * (size - 1) if slope < 0 else least
    return known_true(least >= 0)


def every_row_sees(band: Band, shape: Shape) -> bool:
    """Whether each query provably sees at least one key."""
    above = band.above is None or known_true(band.above >= 0)
    below = band.below is None or known_true(shape.keys - shape.queries + band.below >= 0)
    both = band.above is None or band.below is None or known_true(band.above + band.below >= 0)
    return above and below and both and known_true(shape.keys >= 1)


def arguments(band: Band, shape: Shape) -> tuple[bool, Size, int] | None:
    """(causal, offset, window) of a band, or None where its width depends on the input."""
    if band.above is not None and not writable(band.above):
        return None
    if band.below is None:
        return (False, 0, 0) if band.above is None else (True, band.above, 0)
    if band.above is not None and same_size(band.above, band.below) and known_true(band.below > 0):
        width = constant(band.below)
        return None if width is None else (False, 0, width + 1)
    # Without a limit above, the last key is one.
    above = shape.keys - 1 if band.above is None else band.above
    window = constant(above + band.below + 1)
    return None if window is None or window <= 0 or not writable(above) else (True, above, window)

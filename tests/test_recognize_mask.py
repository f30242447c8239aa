"""passes/recognize_mask.py: what of a mask is structure, and what stays a mask."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

import llmcomp.ops  # noqa: F401
from llmcomp.graph import text, val
from llmcomp.passes.base import run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.recognize_attention import RECOGNIZE_ATTENTION
from tests.graphs import capture, close, run

B, H, D = 2, 2, 4
LOWEST = torch.finfo(torch.float32).min
Found = tuple[bool, str, int, str]


def rewritten(fn: Callable[..., Tensor], *inputs: object, dynamic: bool | None = None) -> GraphModule:
    """The graph of `fn` with attention recognized, after a check that it computes the same."""
    gm = capture(fn, *inputs, dynamic=dynamic)
    expected = run(gm)
    run_passes(gm, (CANONICALIZE, RECOGNIZE_ATTENTION, CANONICALIZE), frozenset({SHAPES}))
    for a, b in zip(run(gm), expected, strict=True):
        close(a, b, 2e-6)
    return gm


def calls(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.llmcomp.attention.default))


def found(gm: GraphModule) -> list[Found]:
    """(causal, offset, window, dtype and shape of the mask) of each attention call of a graph."""
    return [describe(*call.args[3:]) for call in calls(gm)]


def describe(
    mask: Node | None, sinks: None, scale: float, causal: bool, offset: Node | int, window: int, cap: float
) -> Found:
    kind = "none" if mask is None else f"{val(mask).dtype} {list(val(mask).shape)}".removeprefix("torch.")
    return causal, str(offset.meta["val"] if isinstance(offset, Node) else offset), window, kind


def attend(queries: int, keys: int, mask: Tensor) -> Tensor:
    """Attention whose operands are made from the mask's sizes, so that sizes may be symbolic."""
    q = torch.arange(queries * D).sin().view(1, 1, queries, D).expand(mask.shape[0], H, -1, -1)
    k = torch.arange(keys * D).cos().view(1, 1, keys, D).expand(mask.shape[0], H, -1, -1)
    if mask.dtype == torch.bool:
        return F.scaled_dot_product_attention(q, k, k.cos(), mask)
    return torch.softmax(q @ k.mT + mask, -1) @ k.cos()


def positions(queries: int, keys: int, past: int = 0) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None] + past, torch.arange(keys)[None, :]


BANDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Found]] = {
    "causal": (lambda i, j: j <= i, (True, "0", 0, "none")),
    "causal, swapped": (lambda i, j: i >= j, (True, "0", 0, "none")),
    "strict": (lambda i, j: j < i + 1, (True, "0", 0, "none")),
    "not the future": (lambda i, j: ~(j > i), (True, "0", 0, "none")),
    "window": (lambda i, j: (j <= i) & (j > i - 3), (True, "0", 3, "none")),
    "not outside": (lambda i, j: ~((j > i) | (j <= i - 3)), (True, "0", 3, "none")),
    "window of both sides": (lambda i, j: (i - j).abs() <= 2, (False, "0", 3, "none")),
    "lopsided": (lambda i, j: (j <= i + 1) & (j >= i - 2), (True, "1", 4, "none")),
    "window with no end": (lambda i, j: j > i - 3, (True, "6", 9, "none")),
    "all": (lambda i, j: (j >= 0) & (i >= j - 10), (False, "0", 0, "none")),
    "ones and causal": (lambda i, j: i.new_ones((), dtype=torch.bool) & (j <= i), (True, "0", 0, "none")),
    "triangle of ones": (lambda i, j: torch.ones(7, 7).tril() != 0, (True, "0", 0, "none")),
    "triangle cast": (lambda i, j: torch.ones(7, 7).tril().bool(), (True, "0", 0, "none")),
    "triangle of the hidden": (lambda i, j: torch.triu(torch.ones(7, 7), 1) == 0, (True, "0", 0, "none")),
    "twice causal": (lambda i, j: (j <= i + 2) & (j <= i), (True, "0", 0, "none")),
    "blocks": (lambda i, j: i // 2 >= j // 2, (False, "0", 0, "bool [1, 1, 7, 7]")),
    "causal blocks": (lambda i, j: (i // 2 == j // 2) & (j <= i), (True, "0", 0, "bool [1, 1, 7, 7]")),
    "a slope": (lambda i, j: j <= 2 * i, (False, "0", 0, "bool [1, 1, 7, 7]")),
}


def test_bands():
    def fn(x: Tensor) -> list[Tensor]:
        masks = [visible(*positions(7, 7)).expand(x.shape[0], 1, 7, 7) for visible, _ in BANDS.values()]
        return [attend(7, 7, mask) + x for mask in masks]

    gm = rewritten(fn, torch.zeros(B, 1, 1, 1))
    assert dict(zip(BANDS, found(gm), strict=True)) == {name: band for name, (_, band) in BANDS.items()}


def test_queries_behind_a_cache():
    """One query sees all that came before it; more are causal from the length of the cache on."""

    def fn(x: Tensor) -> list[Tensor]:
        visible = [(j <= i)[None, None] for i, j in (positions(q, k, k - q) for q, k in sizes)]
        return [attend(q, k, mask) + x for (q, k), mask in zip(sizes, visible, strict=True)]

    sizes = [(1, 6), (3, 6), (3, 4)]
    one, three, close_by = found(rewritten(fn, torch.zeros(1)))
    assert one == (False, "0", 0, "none")
    assert three == (True, "3", 0, "none") and close_by == (True, "1", 0, "none")


def test_the_order_of_conditions_does_not_matter():
    def fn(x: Tensor) -> Tensor:
        i, j = positions(x.shape[0], x.shape[0])
        mask = torch.where((j > i - 3) & (j <= i), 0.0, LOWEST)
        return attend(x.shape[0], x.shape[0], mask.expand(B, 1, -1, -1)) + x.sum()

    assert found(rewritten(fn, torch.zeros(4), dynamic=True)) == [(True, "0", 3, "none")]


def test_a_bias_and_what_hides_come_apart():
    def fn(x: Tensor) -> list[Tensor]:
        i, j = positions(7, 7)
        bias = x * (j - i)
        masks = torch.where(j <= i, bias, -torch.inf), bias.masked_fill(j > i, -torch.inf)
        return [attend(7, 7, mask.expand(B, H, -1, -1)) for mask in masks]

    assert found(rewritten(fn, torch.tensor(0.5))) == [(True, "0", 0, "float32 [1, 1, 7, 7]")] * 2


def test_length_of_a_cache_may_be_symbolic():
    def fn(cache: Tensor, x: Tensor) -> Tensor:
        past, queries = cache.shape[0], x.shape[0]
        i, j = positions(queries, past + queries, past)
        mask = torch.where((j <= i) & (j > i - 3), 0.0, LOWEST)
        return attend(queries, past + queries, mask.expand(B, 1, -1, -1)) + x.sum()

    gm = rewritten(fn, torch.zeros(5), torch.zeros(4), dynamic=True)
    ((causal, _, window, mask),) = found(gm)
    assert causal and window == 3 and mask == "none"
    (call,) = calls(gm)
    offset = call.args[7]
    assert isinstance(offset, Node) and offset.op == "placeholder"


def padding(length: int = 7) -> Tensor:
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[0, :3] = False
    return mask


def test_padding_stays_beside_the_structure():
    """As transformers builds it for scaled_dot_product_attention."""

    def fn(seen: Tensor) -> Tensor:
        i, j = (t[None, None] for t in positions(7, 7))
        batch = torch.arange(B)[:, None, None, None]
        mask = i.new_ones((), dtype=torch.bool) & (j > i - 4) & (j <= i)
        return attend(7, 7, (mask & seen[batch, j]).expand(B, -1, 7, 7))

    assert found(rewritten(fn, padding())) == [(True, "0", 4, "bool [2, 1, 1, 7]")]


def test_conjuncts_under_views_keep_their_views():
    def fn(seen: Tensor) -> Tensor:
        i, j = positions(7, 8)
        both = ((j <= i) & seen[:, None, :]).transpose(1, 2)[:, :7].transpose(1, 2)
        return attend(7, 7, both[:, None])

    gm = rewritten(fn, padding(8))
    assert found(gm) == [(True, "0", 0, "bool [2, 1, 7, 7]")]


def test_finite_masks_with_padding_stay_as_they_are():
    """Rows of padding see no key: eager gives the mean of all values, and so does the added mask."""

    def fn(seen: Tensor) -> Tensor:
        i, j = positions(7, 7)
        visible = (j <= i) & seen[:, None, None, :]
        return attend(7, 7, torch.where(visible, torch.zeros(()), LOWEST))

    assert found(rewritten(fn, padding())) == [(False, "0", 0, "float32 [2, 1, 7, 7]")]


def test_infinite_masks_with_padding_are_split():
    def fn(seen: Tensor) -> Tensor:
        i, j = positions(7, 7)
        visible = (j <= i) & seen[:, None, None, :]
        return attend(7, 7, torch.where(visible, 0.0, -torch.inf)).nan_to_num(0.0)

    assert found(rewritten(fn, padding())) == [(True, "0", 0, "bool [2, 1, 1, 7]")]


def test_finite_band_that_leaves_a_row_without_keys_stays():
    def fn(x: Tensor) -> Tensor:
        i, j = positions(7, 7)
        return attend(7, 7, torch.where(j <= i - 1, 0.0, LOWEST)[None, None]) + x

    assert found(rewritten(fn, torch.zeros(1))) == [(False, "0", 0, "float32 [1, 1, 7, 7]")]


def test_bias_and_structure_are_told_apart():
    """T5: a bias by relative position and a causal mask, in one sum."""

    def fn(bias: Tensor) -> Tensor:
        i, j = positions(7, 7)
        mask = bias + torch.where(j <= i, 0.0, LOWEST)
        return attend(7, 7, mask[None])

    gm = rewritten(fn, torch.randn(H, 7, 7))
    assert found(gm) == [(True, "0", 0, "float32 [1, 2, 7, 7]")]
    assert "where" not in text(gm.graph)


def test_triangle_of_infinities():
    """torch.nn.Transformer.generate_square_subsequent_mask"""

    def fn(x: Tensor) -> Tensor:
        return attend(7, 7, torch.triu(torch.full((7, 7), -torch.inf), diagonal=1)[None, None]) + x

    assert found(rewritten(fn, torch.zeros(1))) == [(True, "0", 0, "none")]


def test_bool_and_bias_make_one_mask():
    def fn(seen: Tensor, bias: Tensor) -> Tensor:
        q = k = bias[None, None, :, :D].expand(B, H, 7, D)
        scores = (q @ k.mT + bias).masked_fill(~seen[:, None, None, :], -torch.inf)
        return torch.softmax(scores, -1) @ k

    assert found(rewritten(fn, padding(), torch.randn(7, 7))) == [(False, "0", 0, "float32 [2, 1, 7, 7]")]


def test_small_numbers_do_not_hide():
    """exp(-100) is no zero next to a score of -100."""

    def fn(x: Tensor) -> Tensor:
        i, j = positions(7, 7)
        return attend(7, 7, torch.where(j <= i, 0.0, -100.0)[None, None]) + x

    assert found(rewritten(fn, torch.zeros(1))) == [(False, "0", 0, "float32 [1, 1, 7, 7]")]


def test_layers_share_their_mask():
    def fn(seen: Tensor) -> Tensor:
        i, j = positions(7, 7)
        mask = (j <= i) & seen[:, None, None, :]
        return attend(7, 7, mask) + attend(7, 7, mask).cos()

    gm = capture(fn, padding())
    run_passes(gm, (CANONICALIZE, RECOGNIZE_ATTENTION), frozenset({SHAPES}))
    first, second = calls(gm)
    assert first.args[3] is second.args[3]

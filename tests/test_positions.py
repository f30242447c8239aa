"""passes/positions.py: what integer and boolean nodes hold at query i and key j."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from llmcomp.passes.positions import KEY, NEVER, QUERY, ZERO, Affine, constant, integer, negated, truth
from tests.graphs import capture

QUERIES, KEYS = 5, 7


def results(fn: Callable[..., list[Tensor]], *inputs: Tensor, dynamic: bool | None = None) -> list[Node]:
    """The nodes that a captured function returns."""
    output = next(iter(capture(fn, *inputs, dynamic=dynamic).graph.find_nodes(op="output")))
    return list(output.args[0])


def test_integers_are_affine_in_the_positions():
    cases = {
        "arange": (lambda x: torch.arange(QUERIES), (QUERY,), QUERY),
        "start and step": (lambda x: torch.arange(3, 13, 2), (QUERY,), Affine(2, 0, 3)),
        "sum": (lambda x: torch.arange(QUERIES)[:, None] + torch.arange(KEYS), (QUERY, KEY), Affine(1, 1, 0)),
        "difference": (lambda x: 4 - torch.arange(KEYS), (KEY,), Affine(0, -1, 4)),
        "scaled difference": (
            lambda x: torch.sub(torch.arange(QUERIES), torch.arange(QUERIES), alpha=3),
            (KEY,),
            Affine(0, -2, 0),
        ),
        "cast": (lambda x: -torch.arange(QUERIES).int(), (QUERY,), Affine(-1, 0, 0)),
        "one element repeats": (lambda x: torch.arange(1).expand(QUERIES) + 2, (QUERY,), Affine(0, 0, 2)),
        "slice": (lambda x: torch.arange(9)[2:8:3] + 0 * 1, (QUERY,), Affine(3, 0, 2)),
        "slice from the end": (lambda x: torch.arange(9)[-4:] + 1, (QUERY,), Affine(1, 0, 6)),
        "select": (lambda x: torch.arange(9)[3] + torch.arange(QUERIES), (QUERY,), Affine(1, 0, 3)),
        "full": (lambda x: torch.full((QUERIES,), 4) + torch.arange(QUERIES), (QUERY,), Affine(1, 0, 4)),
        "axes move": (
            lambda x: (torch.arange(QUERIES)[:, None] + 2 * 0 + torch.arange(KEYS)).T.permute(1, 0)[None] + 1,
            (None, QUERY, KEY),
            Affine(1, 1, 1),
        ),
        "picked by position": (lambda x: torch.arange(3, 9)[torch.arange(QUERIES) + 1] + 0, (QUERY,), Affine(1, 0, 4)),
        "picked by data": (lambda x: torch.arange(3, 9)[x] + 0, (QUERY,), None),
        "shifted": (
            lambda x: torch.cat([torch.arange(1) - 1, torch.arange(QUERIES)]) * 1 + 0,
            (QUERY,),
            None,  # a product is not read
        ),
        "one before": (
            lambda x: torch.cat([torch.arange(1) - 1, torch.arange(QUERIES)])[:QUERIES] + 0,
            (QUERY,),
            Affine(1, 0, -1),
        ),
        "a step": (lambda x: torch.cat([torch.arange(1), torch.arange(QUERIES)]) + 0, (QUERY,), None),
        "sums of what is never true": (
            lambda x: (torch.arange(QUERIES) == torch.arange(QUERIES) + 1).cumsum(0) + 3,
            (QUERY,),
            Affine(0, 0, 3),
        ),
        "sums of what is not true at this place alone": (
            lambda x: ((torch.arange(QUERIES)[:, None] == torch.arange(KEYS) + 1).cumsum(1) + 3).T,
            (QUERY, QUERY),
            None,
        ),
        "picked in any row": (
            lambda x: torch.arange(KEYS).expand(2, -1)[torch.arange(2)[:, None], torch.arange(KEYS)[None]] + 1,
            (None, KEY),
            Affine(0, 1, 1),
        ),
        "picked in one row of several": (
            lambda x: (torch.arange(2)[:, None] + torch.arange(KEYS))[torch.arange(2)[:, None], torch.arange(KEYS)] + 1,
            (None, KEY),
            None,
        ),
        "sums of data": (lambda x: (x == 1).cumsum(0) + 3, (QUERY,), None),
        "data": (lambda x: torch.arange(QUERIES) + x, (QUERY,), None),
        "product": (lambda x: torch.arange(QUERIES) * torch.arange(QUERIES), (QUERY,), None),
    }
    nodes = results(lambda x: [make(x) for make, _, _ in cases.values()], torch.ones(QUERIES, dtype=torch.int64))
    found = {name: integer(node, index) for (name, (_, index, _)), node in zip(cases.items(), nodes, strict=True)}
    assert found == {name: expected for name, (_, _, expected) in cases.items()}


def test_booleans_are_conjunctions():
    i, j = (lambda: torch.arange(QUERIES)[:, None]), (lambda: torch.arange(KEYS))
    causal = (Affine(1, -1, 0),)
    cases = {
        "le": (lambda x: j() <= i(), causal),
        "lt": (lambda x: j() < i(), (Affine(1, -1, -1),)),
        "ge": (lambda x: i() >= j(), causal),
        "gt": (lambda x: i() > 2, (Affine(1, 0, -3),)),
        "and": (lambda x: (j() <= i()) & (j() >= 2), (*causal, Affine(0, 1, -2))),
        "not": (lambda x: ~(j() > i()), causal),
        "equal everywhere": (lambda x: i() + 1 == i() + 1, ()),
        "equal nowhere": (lambda x: i() - i() == 1, (NEVER,)),
        "unequal everywhere": (lambda x: i() + 1 != i() + 2, ()),
        "equal somewhere": (lambda x: i() == j(), None),
        "not and": (lambda x: ~((j() > i()) & (j() > 2)), None),
        "or nothing": (lambda x: (j() <= i()) | torch.zeros(QUERIES, KEYS, dtype=torch.bool), causal),
        "or everything": (lambda x: (j() <= i()) | torch.ones(QUERIES, KEYS, dtype=torch.bool), ()),
        "distance": (lambda x: (i() - j()).abs() < 3, (Affine(-1, 1, 2), Affine(1, -1, 2))),
        "triangle": (lambda x: torch.ones(QUERIES, KEYS).tril(1), (Affine(1, -1, 1),)),
        "upper triangle": (lambda x: torch.full((QUERIES, KEYS), -1.0).triu(-1), (Affine(-1, 1, 1),)),
        "is zero": (lambda x: torch.ones(QUERIES, KEYS).triu(1) == 0, causal),
        "triangle of nothing": (lambda x: torch.zeros(QUERIES, KEYS).tril(), (NEVER, Affine(1, -1, 0))),
        "cast": (lambda x: (j() <= i()).float().bool(), causal),
        "truncated": (lambda x: torch.full((QUERIES, KEYS), 0.5).tril().int().bool(), None),
        "data": (lambda x: (j() <= i()) & x, None),
    }
    nodes = results(lambda x: [make(x) for make, _ in cases.values()], torch.ones(QUERIES, KEYS, dtype=torch.bool))
    found = {name: truth(node, (QUERY, KEY)) for name, node in zip(cases, nodes, strict=True)}
    assert found == {name: expected for name, (_, expected) in cases.items()}


def test_sizes_of_inputs_are_constants_of_a_graph():
    def fn(x: Tensor) -> list[Tensor]:
        return [torch.arange(4) + x.shape[0]]

    (node,) = results(fn, torch.ones(6), dynamic=True)
    value = integer(node, (QUERY,))
    assert value is not None and value.query == 1
    assert constant(value.rest) is None and constant(value.rest - value.rest) == 0


def test_negation():
    assert negated((QUERY,)) == (Affine(-1, 0, -1),)
    assert negated(()) == (NEVER,)
    assert negated((QUERY, KEY)) is None and negated(None) is None
    assert QUERY - KEY + ZERO == Affine(1, -1, 0)

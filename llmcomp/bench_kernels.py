"""Kernels beside those of libraries: matrix products by rows and formats, and attention.

Every peer is a function that makes its calls from the operands; one that this machine lacks, that raises or that runs
out of memory gets a row that says so. All results are compared with a product in float32 of what the peer was given.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmcomp.backend import compile_model
from llmcomp.bench_timing import copies, device_time, error
from llmcomp.options import read_options
from llmcomp.report import GraphReport


@dataclass(frozen=True)
class Row:
    """One measured thing, or why it could not be measured."""

    what: str
    peer: str
    seconds: float | None = None
    bytes: float = 0.0  # read by one call
    flops: float = 0.0
    error: float | None = None  # relative, root mean square
    note: str = ""


class Missing(Exception):
    """A peer is not on this machine; the text says what was looked for."""


@dataclass(frozen=True)
class Product:
    """x (rows, k) times the transpose of w (n, k)."""

    rows: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.k} x {self.n}"


# A call of each weight, from the rows and the weights (n, k) in turns.
Make = Callable[[Tensor, Sequence[Tensor]], Sequence[Callable[[], Tensor]]]
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # (n, k)


def products(rows: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Iterator[Product]:
    """Every shape with every number of rows."""
    return (Product(m, n, k) for n, k in shapes for m in rows)


def compiled(function: Callable[..., Any], reports: list[GraphReport], mode: str | None = None) -> Callable[..., Any]:
    """`function` behind this backend, with sizes as they are."""

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> nn.Module:
        return compile_model(gm, inputs, read_options({"kv_cache": "off"}, mode), reports.append)

    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def families(reports: Sequence[GraphReport]) -> str:
    """What became of a function: the families of its kernels, and what was left to a library."""
    found = [k.family for r in reports for k in r.program.kernels] + [e.op for r in reports for e in r.program.externs]
    return ", ".join(found)


# ---- the peers of a product --------------------------------------------------------------------------------


def ours(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
    """F.linear, compiled."""
    reports: list[GraphReport] = []
    run = compiled(F.linear, reports)
    run(x, weights[0])
    print(f"ours: {families(reports)}", flush=True)
    return [lambda w=w: run(x, w) for w in weights]  # type: ignore[misc]


def library(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
    """cuBLAS, or what the CPU has."""
    return [lambda w=w: F.linear(x, w) for w in weights]  # type: ignore[misc]


def quantized(format: str) -> Make:
    """Layers whose weights llmcomp.quantize_ has stored in a format."""

    def make(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
        quantize_ = getattr(importlib.import_module("llmcomp.quantization"), "quantize_", None)
        if quantize_ is None:
            raise Missing("llmcomp.quantization.quantize_ is not there")
        layers, reports = [_layer(w) for w in weights], list[GraphReport]()
        for layer in layers:
            quantize_(layer, {"0": format})
        run = compiled(lambda x, w: F.linear(x, w), reports)
        run(x, layers[0][0].weight)
        print(f"ours {format}: {families(reports)}", flush=True)
        return [lambda w=layer[0].weight: run(x, w) for layer in layers]  # type: ignore[misc]

    return make


def _layer(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return nn.Sequential(layer)


def tinygemm(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
    """torch's int4 product, groups of 128."""
    if x.device.type != "cuda":
        raise Missing("_weight_int4pack_mm on a GPU")
    group, packed = 128, []
    for w in weights:
        groups = w.float().view(w.shape[0], -1, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-6)
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8).view(w.shape)
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        zeros = low + 8 * scale
        both = torch.cat([scale, zeros], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
        packed.append((torch.ops.aten._convert_weight_to_int4pack(pairs, 8), both))
    multiply = torch.ops.aten._weight_int4pack_mm
    return [lambda p=p: multiply(x, p[0], group, p[1]) for p in packed]  # type: ignore[misc]


def scaled_fp8(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
    """torch's product of float8 by float8, a scale for each row."""
    kind = torch.float8_e4m3fn
    largest = torch.finfo(kind).max

    def narrow(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / largest
        return (t.float() / scale).to(kind), scale

    codes, x_scale = narrow(x)
    pairs = [narrow(w) for w in weights]
    return [
        lambda w=w, s=s: torch._scaled_mm(codes, w.t(), x_scale, s.t(), out_dtype=torch.bfloat16)  # type: ignore[misc]
        for w, s in pairs
    ]


def sparse(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
    """cuSPARSELt: of four neighbours the two largest."""
    pruned = [torch.sparse.to_sparse_semi_structured(two_of_four(w)) for w in weights]
    return [lambda w=w: F.linear(x, w) for w in pruned]  # type: ignore[misc]


def two_of_four(w: Tensor) -> Tensor:
    """`w` with the two smallest of every four neighbours zero."""
    groups = w.view(-1, 4)
    smallest = groups.abs().topk(2, largest=False).indices
    return groups.scatter(1, smallest, 0.0).view(w.shape)


def torchao(config: str) -> Make:
    """A layer that torchao has quantized."""

    def make(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
        quantization = imported("torchao.quantization")
        layers = [_layer(w) for w in weights]
        for layer in layers:
            quantization.quantize_(layer, getattr(quantization, config)())
        run = torch.compile(lambda x, w: F.linear(x, w), dynamic=False)
        return [lambda w=layer[0].weight: run(x, w) for layer in layers]  # type: ignore[misc]

    return make


def gemlite(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Callable[[], Tensor]]:
    """gemlite's int4 layer, groups of 128."""
    helper = imported("gemlite.helper")
    processor = helper.A16W4_HQQ_INT(device=str(x.device), dtype=x.dtype)
    layers = [processor.from_linear(_layer(w)[0]) for w in weights]
    return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]


def imported(module: str) -> Any:
    """A module that need not be there.

    Raises:
        Missing: it is not importable.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise Missing(f"{module.split('.')[0]} is not importable") from problem


DENSE: dict[str, Make] = {"llmcomp": ours, "library": library}
# Peer -> how it is made, bytes of a weight, and how far a result may be from that of the float weights.
PACKED: dict[str, tuple[Make, float, float]] = {
    "library bf16": (library, 2.0, 0.01),
    "llmcomp int8": (quantized("int8"), 1.0, 0.02),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), 1.0, 0.02),
    "llmcomp fp8": (quantized("fp8"), 1.0, 0.05),
    "_scaled_mm fp8": (scaled_fp8, 1.0, 0.08),
    "torchao fp8": (torchao("Float8WeightOnlyConfig"), 1.0, 0.05),
    "llmcomp int4": (quantized("int4"), 0.53, 0.15),
    "_weight_int4pack_mm": (tinygemm, 0.53, 0.15),
    "torchao int4": (torchao("Int4WeightOnlyConfig"), 0.53, 0.15),
    "gemlite int4": (gemlite, 0.53, 0.15),
    "cuSPARSELt 2:4": (sparse, 1.125, 1.0),
}


def measure_product(product: Product, peer: str, make: Make, width: float, bound: float, device: str) -> Row:
    """Time one peer at one product; it never raises for what a peer does."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(torch.bfloat16)

    row = Row(str(product), peer, flops=2.0 * product.rows * product.n * product.k)
    read = width * product.n * product.k + 2 * product.rows * (product.k + product.n)
    try:
        x = random(product.rows, product.k)
        weights = [random(product.n, product.k) / product.k**0.5 for _ in range(copies(int(read), device))]
        torch._dynamo.reset()
        with torch.no_grad():
            calls = make(x, weights)
            seconds = device_time(calls, device)
            wrong = error(calls[-1](), x.float() @ weights[-1].float().t())
    except Exception as problem:
        return failed(row, problem)
    note = "" if wrong <= bound else f"WRONG: an error of {wrong:.3g}, {bound:.3g} is allowed"
    return Row(row.what, peer, seconds, read, row.flops, wrong, note)


def failed(row: Row, problem: Exception) -> Row:
    """The row of a peer that could not be measured."""
    text = " ".join(str(problem).split())[:200]
    note = text if isinstance(problem, Missing) else f"{type(problem).__name__}: {text}"
    return Row(row.what, row.peer, note=note)


# ---- attention ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Causal attention of `queries` that end at the last of `keys`; 8 heads of keys, 32 of queries, of 128 channels."""

    queries: int
    keys: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def __str__(self) -> str:
        return f"b{self.batch} {self.queries} queries, {self.keys} keys, {self.heads}/{self.kv_heads} x {self.dim}"


BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def measure_attention(shape: Heads, peer: str, device: str) -> Row:
    """Time one way to compute attention; it never raises for what a peer does."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        size = (shape.batch, heads, length, shape.dim)
        return torch.randn(size, device=device, generator=generator).to(torch.bfloat16)

    seen = shape.queries * (shape.keys - (shape.queries - 1) / 2)  # pairs of a query and a key
    flops = 4.0 * shape.batch * shape.heads * shape.dim * seen
    read = 4.0 * shape.batch * shape.dim * (shape.kv_heads * shape.keys + shape.heads * shape.queries)
    row = Row(str(shape), peer)
    causal = shape.queries > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    try:
        q = random(shape.heads, shape.queries)
        many = copies(int(read), device) if not causal else 2
        pairs = [(random(shape.kv_heads, shape.keys), random(shape.kv_heads, shape.keys)) for _ in range(many)]
        torch._dynamo.reset()
        with torch.no_grad():
            run = compiled(attend, []) if peer == "llmcomp" else chosen(attend, BACKENDS[peer])
            seconds = device_time([lambda k=k, v=v: run(q, k, v) for k, v in pairs], device)  # type: ignore[misc]
            k, v = pairs[-1]
            head = exact_head(q[:1, 0], k[:1, 0], v[:1, 0], causal)
            wrong = error(run(q, k, v)[:1, 0], head)
    except Exception as problem:
        return failed(row, problem)
    note = "" if wrong <= 0.02 else f"WRONG: an error of {wrong:.3g}"
    return Row(row.what, peer, seconds, read, flops, wrong, note)


def chosen(attend: Callable[..., Tensor], backend: SDPBackend) -> Callable[..., Tensor]:
    """`attend` by one backend of SDPA."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return run


def exact_head(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One head in float32, (1, queries, channels)."""
    score = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(hidden, float("-inf"))
    exact: Tensor = score.softmax(-1) @ v.float()
    return exact

"""The backend, as a table of contents: Dynamo graph -> capture -> passes -> program.

    torch.compile(model, backend="llmcomp")

Read this file first, then passes/__init__.py and codegen/kernel.py.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import dropwhile
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from llmcomp import bisect, compat, debug, integrate, verify
from llmcomp.cache_ops import KV_DTYPES
from llmcomp.capture import capture_graph
from llmcomp.codegen.cpp_packed import expands, skipping
from llmcomp.codegen.fit import Lowerer
from llmcomp.cuda_graph import GraphedProgram
from llmcomp.options import Options, read_options
from llmcomp.passes import pipeline, recognizing
from llmcomp.passes.base import Pass, PassResult, run_passes
from llmcomp.passes.cached_graph import CACHED
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.insert_kv_cache import NAME as INSERT_KV_CACHE
from llmcomp.passes.insert_kv_cache import PLAN
from llmcomp.passes.prune import prune
from llmcomp.prepared import PreparedProgram, snapshot, split, weights_of
from llmcomp.program import Executable, compile_program, usable
from llmcomp.quantization import quantize_inputs
from llmcomp.reference import ReferenceProgram
from llmcomp.report import GraphReport, Program, StageTime
from llmcomp.reuse import ReusingProgram
from llmcomp.static_cache import TakingOver, plain_caches, warn_of_plain, with_codes
from llmcomp.target import cpu, detect

EMPTY: Mapping[str, torch.Tensor] = MappingProxyType({})


class Compiled(torch.nn.Module):
    """What Dynamo calls in place of its graph: a module, since torch's accuracy minifier checks no other."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = run


def llmcomp(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> torch.nn.Module:
    """Compile one Dynamo graph: the entry point that `backend="llmcomp"` names.

    Raises:
        OptionError: an unknown option or mode.
        LlmcompError: its other subclasses say what was expected, what was found and what to do.
    """
    return compile_model(gm, example_inputs, read_options(options, mode))


def compile_model(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    watch: Callable[[GraphReport], None] = lambda report: None,
) -> Compiled:
    """Compile one Dynamo graph; `watch` sees the report of each ATen graph that it becomes.

    With the option `weights`, the weights that the graph reads are quantized first, in the model itself. With
    `kv_dtype`, caches of fixed size that it is given are from then on.
    """
    if options.weights is not None and quantize_inputs(example_inputs, options.weights):
        compat.trace_again("weights were quantized")

    def compile_graph(graph: GraphModule, fake_inputs: Sequence[Any]) -> Program:
        with compat.real_tensors():  # passes look at constants and evaluate small functions
            program, report = compile_aten(graph, options, weights_of(graph, example_inputs))
        watch(report)
        return program

    dtype = None if options.kv_dtype is None else KV_DTYPES[options.kv_dtype]
    plain = () if dtype is None else plain_caches(gm, example_inputs)
    if dtype is None or not plain:
        return Compiled(capture_graph(gm, example_inputs, compile_graph))
    example_inputs = with_codes(gm, example_inputs, plain, dtype)
    return Compiled(TakingOver(capture_graph(gm, example_inputs, compile_graph), plain, dtype))


def compile_aten(
    gm: GraphModule, options: Options, weights: Mapping[str, torch.Tensor] = EMPTY
) -> tuple[Program, GraphReport]:
    """Compile one captured ATen graph, rewriting `gm` in place.

    `weights` are the values of its parameters, by the names of the placeholders, where they hold zeros to be left out.
    """
    pruned, told = compile_pruned(gm, options, weights) if weights else (None, ())
    if pruned is not None:
        return pruned
    captured, start = len(gm.graph.nodes), time.perf_counter()
    target = usable(detect(options, devices(gm.graph)), options)
    lowerer = Lowerer()
    kv_dtype = None if options.kv_dtype is None else KV_DTYPES[options.kv_dtype]
    passes = pipeline(target, lowerer.fits, kv_dtype, options.strided_results)
    passes = () if target.name == "reference" else wanted(gm, passes, options)
    seen = debug.Stages(gm, options)
    kept = verify.Stages(gm) if options.verify else None

    def watch(p: Pass, gm: GraphModule, result: PassResult) -> None:
        seen.after_pass(p, gm, result)
        if kept is not None:
            kept.after_pass(p, gm, result)

    results = run_passes(gm, passes, frozenset({SHAPES}), bisect.gate(gm, passes), watch)
    warn_of_plain(results, options.kv_dtype)
    seconds = time.perf_counter() - start
    program: Program
    if target.name == "reference":
        program = ReferenceProgram(gm, "the target calls eager operators")
    else:
        program = graphed(compile_program(gm, lowerer, options, target), gm.meta.get("kind"), options)
    seen.built(program.report, program.source)
    if kept is not None:
        program = verify.VerifiedProgram(program, kept.stages)
    if (plan := gm.meta.get(PLAN)) is not None:
        program = ReusingProgram(
            program, plan, lambda cached: compile_cached(cached, options), options.kv_cache_bytes, options.verify
        )
    stages = (StageTime("passes", seconds), *program.report.stages)
    return program, GraphReport(gm.meta.get("kind", ""), captured, (*told, *results), program.report, stages)


def compile_pruned(
    gm: GraphModule, options: Options, weights: Mapping[str, torch.Tensor]
) -> tuple[tuple[Program, GraphReport] | None, tuple[PassResult, ...]]:
    """Compile a graph without the zeros of its weights; where there is nothing to leave out, None and the reasons."""
    target = usable(detect(options, devices(gm.graph)), options)
    if target.name == "reference":
        return None, ()
    packs, skips = (expands(), skipping()) if target.name == "cpp" else (False, 0)
    less, passes = snapshot(gm), (*recognizing(), prune(weights, packs, skips))
    kept = verify.Stages(less) if options.verify else None
    watch = kept.after_pass if kept is not None else lambda p, gm, result: None
    results = run_passes(less, passes, frozenset({SHAPES}), bisect.gate(less, passes), watch)
    pruning = tuple(result for result in results if result.name == "prune")
    if not any(result.report.rewrites for result in pruning):
        return None, pruning
    dense, parts = snapshot(gm), split(less)
    main, report = compile_aten(parts.main, options)
    program: Program = PreparedProgram(main, parts, lambda: compile_cached(dense, options))
    if kept is not None:
        program = verify.VerifiedProgram(program, kept.stages)
    done = {result.name for result in results}
    again = dropwhile(lambda result: result.name in done, report.passes)  # they find nothing the second time
    return (program, replace(report, passes=(*results, *again))), pruning


def graphed(program: Executable, kind: object, options: Options) -> Program:
    """`program`, its launches replayed as a CUDA graph where that was asked for and results live for a step."""
    wants = options.captures and kind not in ("forward", "backward") and not options.verify
    return GraphedProgram(program, program.inputs) if wants and program.inputs is not None else program


def compile_cached(gm: GraphModule, options: Options) -> Program:
    """Compile a cached graph, made of a proof that the passes left on a captured one."""
    with compat.real_tensors():
        program, _ = compile_aten(gm, options)
    return program


def wanted(gm: GraphModule, passes: tuple[Pass, ...], options: Options) -> tuple[Pass, ...]:
    """The passes for one graph: a KV cache is inserted into whole inference graphs (of those that record gradients the
    pass says so), and the passes before it are done where it has been.
    """
    at = [p.name for p in passes].index(INSERT_KV_CACHE)
    if gm.meta.get("kind") == CACHED:
        return passes[at + 1 :]
    inserts = options.kv_cache == "auto" and gm.meta.get("kind") in ("inference", "forward")
    return passes if inserts else passes[:at] + passes[at + 1 :]


def devices(graph: Graph) -> frozenset[torch.device]:
    """The devices of all tensors of `graph`."""
    values = (n.meta.get("val") for n in graph.nodes)
    return frozenset(v.device for v in values if isinstance(v, torch.Tensor))


# Torch loads this module when a user first names the backend: the moment to make generate() of compiled
# modules run compiled and to raise Dynamo's limit, since both matter before the first graph arrives.
integrate.install(llmcomp, bisect.optional(pipeline(cpu(), Lowerer().fits)))

"""The shape of the source: layers, package links, no global state, no work at import, readable sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llmcomp.codegen
import llmcomp.passes

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"llmcomp": "llmcomp", "llmcomp.passes": "passes", "llmcomp.codegen": "codegen"}

# A module imports from lower layers and from its own; passes and codegen know nothing of each other. A module
# of llmcomp/ that is not named here stands between them and the backend.
BENCH = "gpu growing kernels llama_cpp machine model overhead peer process steps timing"
LAYERS = (
    ("llmcomp.errors",),
    ("llmcomp.options", "llmcomp.target", "llmcomp.compat"),
    ("llmcomp.formats", "llmcomp.nibbles", "llmcomp.pairs", "llmcomp.dynamic"),
    (
        *("llmcomp.graph", "llmcomp.ops", "llmcomp.hints", "llmcomp.region", "llmcomp.pointwise"),
        *(
            "llmcomp.packed_ops",
            "llmcomp.products",
            "llmcomp.two_four",
            "llmcomp.masked",
            "llmcomp.blocks",
            "llmcomp.saliency",
        ),
        "llmcomp.costs",
    ),
    ("llmcomp.cache_ops", "llmcomp.quantized_cache"),
    ("llmcomp.passes", "llmcomp.codegen"),
    ("*",),
    ("llmcomp.backend",),
    ("llmcomp.explanation", "llmcomp.replay"),
    ("llmcomp.fixed_forward", "llmcomp.decoding", "llmcomp.generation"),
    (
        *(f"llmcomp.bench_{part}" for part in BENCH.split()),
        "llmcomp.bench",
    ),
    ("llmcomp",),
)
LATE_IMPORTS = {
    "llmcomp.options": "formats bring in torch",
    "llmcomp.quantization": "what prepares a model of transformers brings that in",
    "llmcomp.codegen.lower": "calls the files of the families, which use its parts",
    "llmcomp.codegen.render": "only the printer of the target is imported",
}

# Symptoms to look at, not laws: what goes beyond them is listed with its reason.
LINES_OF_FILE = 450
LINES_OF_FUNCTION = 60
LONG = {
    "llmcomp.codegen.triton_prelude": "device functions, one after another",
    "llmcomp.codegen.triton_codes": "device functions, one after another",
    "llmcomp.codegen.triton_attend": "the prefill, decode and combine skeletons of one family",
    "llmcomp.codegen.triton_contract": "the decode and the tile skeletons of one family",
    "llmcomp.pointwise.table": "a table",
}


def sources() -> dict[str, Path]:
    """Every module by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = sources()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a syntax tree imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "llmcomp")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmcomp":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def at_top(tree: ast.Module) -> ast.Module:
    """The part of a module that runs when it is imported and is not for type checkers only."""
    kept = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    return ast.Module(kept, [])


def layer(module: str) -> int:
    """The position of a module in LAYERS."""
    package = next((p for p in ("llmcomp.passes", "llmcomp.codegen") if module.startswith(p)), module)
    known = [i for i, names in enumerate(LAYERS) if package in names]
    return known[0] if known else LAYERS.index(("*",))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for other in imported(at_top(TREES[module])):
        assert layer(other) <= layer(module), f"{module} imports {other}, which stands above it"
        pair = {module.split(".")[1:2][0] if "." in module else "", other.split(".")[1:2][0]}
        assert pair != {"passes", "codegen"}, f"{module} imports {other}"


def test_imports_have_no_cycle() -> None:
    graph = {name: set(imported(at_top(tree))) - {name} for name, tree in TREES.items()}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(MODULES.keys() - LATE_IMPORTS.keys()))
def test_imports_are_at_the_top(module: str) -> None:
    everywhere, top = list(imported(TREES[module])), list(imported(at_top(TREES[module])))
    assert len(everywhere) == len(top) or "TYPE_CHECKING" in MODULES[module].read_text()


def test_packages_are_the_folders_of_the_repository() -> None:
    for package, name in ((llmcomp.passes, "passes"), (llmcomp.codegen, "codegen")):
        assert Path(str(package.__file__)).resolve().parent == ROOT / name
        link = ROOT / "llmcomp" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name


@pytest.mark.parametrize("module", MODULES)
def test_no_global_statement(module: str) -> None:
    assert not [n for n in ast.walk(TREES[module]) if isinstance(n, ast.Global)]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(TREES[module])
    assert MODULES[module].read_text().isascii()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("llmcomp", ("torch", "triton", "transformers", "rich")),
        ("llmcomp.options", ("torch", "triton")),
        ("llmcomp.passes", ("torch._inductor", "triton", "transformers")),
        ("llmcomp.codegen.render", ("torch._inductor", "triton", "transformers")),
        ("llmcomp.backend", ("transformers", "rich")),
    ],
)
def test_importing_is_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module."""
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def sizes() -> dict[str, int]:
    """The lines of every module and function."""
    found = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    for name, tree in TREES.items():
        found |= {f"{name}.{f.name}": (f.end_lineno or 0) - f.lineno + 1 for f in functions(tree)}
    return found


def test_what_is_long_has_a_reason() -> None:
    long = {n for n, lines in sizes().items() if lines > (LINES_OF_FILE if n in MODULES else LINES_OF_FUNCTION)}
    assert long == LONG.keys()


def test_the_median_function_is_short() -> None:
    lengths = sorted((f.end_lineno or 0) - f.lineno + 1 for t in TREES.values() for f in functions(t))
    assert lengths[len(lengths) // 2] <= 10

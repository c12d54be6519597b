"""Who imports whom: layers, of which each knows only those below, and no cycle anywhere.

``python -m tests.test_architecture`` prints the layers with all imports, the longest files, and the functions that take most.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib as toml
else:
    import tomli as toml  # which pytest and mypy depend on there

ROOT = Path(__file__).parents[1]
PACKAGE = "spectral_compile"
ROOMS = {"spectral_compile": PACKAGE, "kernels": f"{PACKAGE}.kernels", "passes": f"{PACKAGE}.passes"}  # folders and packages
LAYERS: dict[str, tuple[str, ...]] = {  # from the bottom up; patterns of modules, without the name of the package
    "basics": ("errors", "files", "asked", "outputs"),
    "codec": ("codec", "codec.*"),
    "kernels": ("kernels.*",),
    "options and reports": ("config", "report", "limit", "fingerprint"),
    "cache": ("foreign", "cache", "cache.*", "tensor", "stats"),
    "runtime": ("plan", "replay", "runtime"),
    "passes": ("passes.*",),
    "backend": ("ahead", "artefacts", "backend", "explain", "entry", "saved", "unsloth"),
    "package": ("",),
    "checkpoints": ("models", "packaged"),
    "evaluation": ("evaluation", "evaluation.*"),
    "bench": ("bench", "bench.*"),
    "command line": ("cli", "cli.*"),
}
# Beyond the layers: passes know a compressed tensor by its type and its metadata, and never touch its store.
APART = (("passes.*", "cache*"), ("passes.*", "runtime"), ("passes.*", "replay"))
MOST = 8  # parameters of a function; more want a value object


@dataclass(frozen=True)
class Module:
    """A file of the package, by its name without the package's: ``codec.basis``, and "" for the package itself."""

    name: str
    path: Path

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Import:
    """That ``source`` imports ``target``; ``lazy`` where that happens within a function, and so not on import."""

    source: str
    target: str
    lazy: bool


@cache
def modules() -> dict[str, Module]:
    """All modules of the package, by name."""
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts[1:] if part != "__init__")
            found[name] = Module(name, path)
    return found


@cache
def imports() -> frozenset[Import]:
    """Every import of a module of the package by another one, those for type checkers too."""
    return frozenset(one for module in modules().values() for one in imports_of(module) if one.source != one.target)


def imports_of(module: Module) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for target in targets(child, module):
                yield Import(module.name, target, lazy)
            yield from visit(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    yield from visit(module.tree, False)


def targets(node: ast.AST, module: Module) -> Iterator[str]:
    """The modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            own = [PACKAGE, *module.name.split(".")] if module.name else [PACKAGE]
            above = own[: len(own) - node.level + module.is_package]
            base = ".".join([*above, *([node.module] if node.module else [])])
        names = [f"{base}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        if name.split(".")[0] == PACKAGE:
            yield nearest(name.removeprefix(PACKAGE).removeprefix("."))


def nearest(name: str) -> str:
    """The module that ``name`` is, or is a name in."""
    while name not in modules() and name:
        name = name.rpartition(".")[0]
    return name


def layer(name: str) -> int:
    """The number of a module's layer."""
    for number, patterns in enumerate(LAYERS.values()):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"{name or PACKAGE} stands in no layer: name it in LAYERS, above all that it imports")


def test_no_module_imports_upward() -> None:
    upward = [f"{one.source} -> {one.target}" for one in imports() if layer(one.target) > layer(one.source)]
    assert sorted(upward) == []


def test_no_cycle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for one in imports():
        graph[one.source].add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(reversed(error.args[1]))}")


def test_passes_know_no_store() -> None:
    crossed = [
        f"{one.source} -> {one.target}"
        for one in imports()
        for source, target in APART
        if fnmatch.fnmatchcase(one.source, source) and fnmatch.fnmatchcase(one.target, target)
    ]
    assert crossed == []


def test_kernels_know_no_graph() -> None:
    for module in modules().values():
        if module.name.startswith("kernels."):
            imported = {alias.name for node in ast.walk(module.tree) if isinstance(node, ast.Import) for alias in node.names}
            imported |= {node.module or "" for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom)}
            assert not [name for name in imported if name.startswith(("torch.fx", "torch._dynamo", "transformers"))], module


def test_types_are_checked_everywhere_but_in_what_triton_compiles() -> None:
    """What mypy passes over in pyproject.toml are just the modules with a kernel."""
    overrides = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]
    patterns = [pattern for one in overrides if one.get("ignore_errors") for pattern in one["module"]]
    passed_over = {name for name in modules() if any(fnmatch.fnmatchcase(f"{PACKAGE}.{name}", x) for x in patterns)}
    assert passed_over == {name for name, module in modules().items() if compiled_by_triton(module)}


def compiled_by_triton(module: Module) -> bool:
    functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef)]
    decorators = [ast.unparse(decorator) for function in functions for decorator in function.decorator_list]
    return any("triton.jit" in decorator or decorator in ("function", "warp.function") for decorator in decorators)


def test_functions_take_few_parameters() -> None:
    assert [f"{place}: {count}" for place, count in widest() if count > MOST] == []


def widest() -> list[tuple[str, int]]:
    """All functions outside of kernels by their number of parameters, most first; commands, which take options, left out."""
    found = []
    for module in modules().values():
        if module.name.startswith("kernels."):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_command(node):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                taken = [x for x in given if x.arg not in ("self", "cls")]
                found.append((f"{module.path.relative_to(ROOT)}:{node.lineno} {node.name}", len(taken)))
    return sorted(found, key=lambda one: (-one[1], one[0]))


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether parameters are annotated as options or arguments of a command line."""
    annotations = [ast.unparse(x.annotation) for x in function.args.args if x.annotation is not None]
    return any(text.startswith("Annotated[") and ("Option(" in text or "Argument(" in text) for text in annotations)


def drawing() -> str:
    """The layers from the top down, in each its modules, and what each imports; what is imported within functions last."""
    lines = []
    for number, name in reversed(list(enumerate(LAYERS))):
        own = [module for module in modules() if layer(module) == number]
        lines += [name] if own else []
        for module in own:
            eager = sorted({one.target or PACKAGE for one in imports() if one.source == module and not one.lazy})
            lazy = sorted({one.target or PACKAGE for one in imports() if one.source == module and one.lazy} - {*eager})
            known = ", ".join(eager) + (f"{'; ' if eager else ''}lazily {', '.join(lazy)}" if lazy else "")
            line = f"  {module or PACKAGE}" + (f" -> {known}" if known else "")
            lines += textwrap.wrap(line, 128, subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines)


def main() -> None:
    print(drawing())
    print("\nlongest files, in lines")
    lines = [(len(module.path.read_text(encoding="utf-8").splitlines()), module.path) for module in modules().values()]
    for count, path in sorted(lines, reverse=True)[:10]:
        print(f"{count:5} {path.relative_to(ROOT)}")
    print("\nfunctions with most parameters, but for commands and kernels")
    for place, count in widest()[:10]:
        print(f"{count:5} {place}")


if __name__ == "__main__":
    main()

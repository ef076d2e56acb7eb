"""Imports point down only, in the order that pyproject.toml declares for the linter."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

from tests.architecture.sources import Source, functions, parse, pyproject, sources

Import = ast.Import | ast.ImportFrom

ADAPTERS = {"asteria/cli/progress.py": {"tqdm"}}
"""Modules that do without the optional dependency which they adapt, where it is not installed."""


def contract(kind: str) -> dict[str, object]:
    (found,) = (c for c in pyproject()["tool"]["importlinter"]["contracts"] if c["type"] == kind)
    return dict(found)


def floors() -> list[set[str]]:
    """The packages and modules of each floor, the highest first."""
    layers = contract("layers")["layers"]
    assert isinstance(layers, list)
    return [{name.strip() for name in layer.split("|")} for layer in layers]


def imported(source: Source, modules: Iterable[str]) -> Iterator[tuple[Import, str]]:
    """(statement, asteria module) for every import; names that are modules count as such."""
    known = set(modules)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "asteria":
                    yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "asteria":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node, inner if inner in known else str(node.module)


def upward(files: Iterable[Source], order: list[set[str]]) -> list[str]:
    """Imports that do not point to a lower floor or stay in their package."""
    files = list(files)
    modules = [source.module for source in files]
    level = {name: height for height, names in enumerate(reversed(order)) for name in names}
    offenders = []
    for source in files:
        if source.module == "asteria":
            continue  # the public surface stands above all floors
        own = source.module.split(".")[1]
        for node, target in imported(source, modules):
            other = target.split(".")[1] if "." in target else ""
            if other != own and level.get(other, len(order)) >= level[own]:
                offenders.append(f"{source.at(node)}: {own} must not import {target}")
    return offenders


def import_graph(files: Iterable[Source]) -> dict[str, set[str]]:
    files = list(files)
    modules = [source.module for source in files]
    return {source.module: {name for _, name in imported(source, modules)} for source in files}


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, empty if there are none."""
    ring = set(graph)
    while True:
        targets = {target for module in ring for target in graph[module]}
        kept = {module for module in ring & targets if graph[module] & ring}
        if kept == ring:
            return sorted(ring)
        ring = kept


def local_imports(files: Iterable[Source]) -> list[str]:
    return [
        f"{source.at(node)}: import in {function.name}"
        for source in files
        for function in functions(source)
        for node in ast.walk(function)
        if isinstance(node, Import)
    ]


def test_the_order_is_exhaustive_and_names_nothing_else() -> None:
    children = {s.module.split(".")[1] for s in sources("asteria") if s.module != "asteria"}
    names = [name for floor in floors() for name in floor]
    assert sorted(names) == sorted(children), "every package stands on exactly one floor"


def test_the_linter_holds_the_same_order() -> None:
    layers = contract("layers")
    assert pyproject()["tool"]["importlinter"]["root_package"] == "asteria"
    assert layers["containers"] == ["asteria"]
    assert layers["exhaustive"] is True
    assert contract("acyclic_siblings")["ancestors"] == ["asteria"]


def test_imports_point_down() -> None:
    offenders = upward(sources("asteria"), floors())
    assert not offenders, "\n".join(offenders)


def test_there_are_no_cycles() -> None:
    ring = cycle(import_graph(sources("asteria")))
    assert not ring, "these modules import each other: " + ", ".join(ring)


def test_no_import_hides_in_a_function() -> None:
    offenders = local_imports(sources("asteria"))
    assert not offenders, "\n".join(offenders)


def test_imports_are_absolute_and_name_what_they_take() -> None:
    offenders = [
        f"{source.at(node)}: relative or star import"
        for source in sources("asteria")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and (node.level or node.names[0].name == "*")
    ]
    assert not offenders, "\n".join(offenders)


def test_only_declared_dependencies_are_imported() -> None:
    declared = {re.split(r"[^\w.-]", text)[0] for text in pyproject()["project"]["dependencies"]}
    allowed = declared | set(sys.stdlib_module_names) | {"asteria"}
    offenders = []
    for source in sources("asteria"):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            known = allowed | ADAPTERS.get(source.path, set())
            offenders += [
                f"{source.at(node)}: {name}" for name in names if name.split(".")[0] not in known
            ]
    assert not offenders, "not in project.dependencies:\n" + "\n".join(offenders)


def test_the_checks_find_what_they_look_for() -> None:
    low = parse("from asteria.high import top\n", "asteria/low/floor.py")
    sibling = parse("import asteria.low.floor\n", "asteria/side/floor.py")
    high = parse("def f():\n    from asteria.low import floor\n", "asteria/high/top.py")
    order = [{"high"}, {"low", "side"}]
    assert upward([low, sibling, high], order) == [
        "asteria/low/floor.py:1: low must not import asteria.high.top",
        "asteria/side/floor.py:1: side must not import asteria.low.floor",
    ]
    surface = parse("import asteria\n", "asteria/low/floor.py")
    assert upward([surface], order) == ["asteria/low/floor.py:1: low must not import asteria"]
    assert local_imports([low, sibling, high]) == ["asteria/high/top.py:2: import in f"]
    graph = import_graph([low, sibling, high])
    assert cycle(graph) == ["asteria.high.top", "asteria.low.floor"]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]

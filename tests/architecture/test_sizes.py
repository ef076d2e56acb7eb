"""No file, function, class or signature grows beyond what can be read at once."""

import ast
from collections.abc import Iterable

import pytest

from tests.architecture.sources import (
    Source,
    classes,
    functions,
    is_scalar,
    lines,
    parse,
    sources,
    wide_parameters,
)

FILE, FUNCTION, CLASS, PARAMETERS, EXAMPLE = 400, 60, 250, 8, 300


def long_files(files: Iterable[Source], limit: int) -> list[str]:
    sizes = [(source.path, len(source.text.splitlines())) for source in files]
    return [f"{path}: {size} lines, allowed {limit}" for path, size in sizes if size > limit]


def long_functions(files: Iterable[Source], limit: int) -> list[str]:
    return [
        f"{source.at(function)}: {function.name} has {lines(function)} lines, allowed {limit}"
        for source in files
        for function in functions(source)
        if lines(function) > limit
    ]


def long_classes(files: Iterable[Source], limit: int) -> list[str]:
    return [
        f"{source.at(node)}: class {node.name} has {lines(node)} lines, allowed {limit}"
        for source in files
        for node in classes(source)
        if lines(node) > limit
    ]


def wide_signatures(files: Iterable[Source], limit: int) -> list[str]:
    return [
        f"{source.at(function)}: {function.name} has {len(names)} parameters that are no scalars "
        f"({', '.join(names)}), allowed {limit}"
        for source in files
        for function in functions(source)
        if len(names := wide_parameters(function)) > limit
    ]


def check(offenders: list[str]) -> None:
    assert not offenders, "too large, split by subject:\n  " + "\n  ".join(offenders)


def test_the_package_is_found() -> None:
    assert {"asteria/__init__.py", "asteria/errors.py"} <= {s.path for s in sources("asteria")}


@pytest.mark.parametrize("folder", ["asteria", "benchmarks", "tests"])
def test_files_are_short(folder: str) -> None:
    check(long_files(sources(folder), FILE))


def test_examples_are_shorter() -> None:
    check(long_files(sources("examples"), EXAMPLE))


@pytest.mark.parametrize("folder", ["asteria", "benchmarks", "examples", "tests"])
def test_functions_are_short(folder: str) -> None:
    check(long_functions(sources(folder), FUNCTION))


@pytest.mark.parametrize("folder", ["asteria", "benchmarks", "tests"])
def test_classes_are_short(folder: str) -> None:
    check(long_classes(sources(folder), CLASS))


def test_signatures_are_narrow() -> None:
    check(wide_signatures(sources("asteria"), PARAMETERS))


def test_the_measures_find_what_is_too_large() -> None:
    source = parse("class C:\n    def f(self, a, b: int, *c: Tensor) -> None:\n        ...\n")
    assert long_files([source], 2) == ["asteria/example.py: 3 lines, allowed 2"]
    assert long_files([source], 3) == []
    assert long_functions([source], 1) == ["asteria/example.py:2: f has 2 lines, allowed 1"]
    assert long_functions([source], 2) == []
    assert long_classes([source], 2) == ["asteria/example.py:1: class C has 3 lines, allowed 2"]
    assert long_classes([source], 3) == []
    assert "2 parameters that are no scalars (a, c)" in wide_signatures([source], 1)[0]
    assert wide_signatures([source], 2) == []


@pytest.mark.parametrize(
    ("annotation", "scalar"),
    [
        ("int", True),
        ("float | None", True),
        ("'int | None'", True),
        ("Literal['a', 'b']", True),
        ("Literal['a'] | bool | None", True),
        ("Optional[int]", True),
        ("Union[int, str]", True),
        ("float | Tensor", False),
        ("Optional[Tensor]", False),
        ("tuple[int, int]", False),
        ("torch.dtype", False),
        ("Any", False),
    ],
)
def test_scalars_are_told_from_the_rest(annotation: str, scalar: bool) -> None:
    assert is_scalar(ast.parse(annotation, mode="eval").body) is scalar

"""What the package offers is pinned, documented and typed."""

import ast
import re
import types

import pytest

import asteria
from asteria import errors
from tests.architecture.sources import (
    ROOT,
    Source,
    changelog_headings,
    functions,
    has_decorator,
    module_all,
    parse,
    pyproject,
    sources,
)

PUBLIC = [
    "KLSOAP",
    "SOAP",
    "AsteriaError",
    "CheckpointError",
    "CoherenceError",
    "ConfigError",
    "GradientError",
    "KLShampoo",
    "NonFiniteGradientError",
    "ParameterChangedError",
    "RefreshError",
    "RuntimeConfig",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
    "__version__",
    "logging_dict",
    "plan",
    "slim",
]

ERRORS: dict[str, tuple[type, ...]] = {
    "AsteriaError": (Exception,),
    "ConfigError": (errors.AsteriaError, ValueError),
    "GradientError": (errors.AsteriaError, RuntimeError),
    "NonFiniteGradientError": (errors.GradientError,),
    "ParameterChangedError": (errors.AsteriaError, RuntimeError),
    "RefreshError": (errors.AsteriaError, RuntimeError),
    "StoreError": (errors.AsteriaError, RuntimeError),
    "StoreFullError": (errors.StoreError,),
    "StoreCorruptError": (errors.StoreError,),
    "CheckpointError": (errors.AsteriaError, ValueError),
    "CoherenceError": (errors.AsteriaError, RuntimeError),
}


def undocumented(source: Source) -> list[str]:
    """Public classes, functions and methods without a docstring, and the module itself."""
    missing = [] if ast.get_docstring(source.tree) else [f"{source.path}: the module"]
    open_nodes: list[ast.Module | ast.ClassDef] = [source.tree]
    while open_nodes:
        for node in open_nodes.pop().body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                open_nodes.append(node)
            elif has_decorator(node, "overload"):
                continue
            if not ast.get_docstring(node):
                missing.append(f"{source.at(node)}: {node.name}")
    return missing


def misdeclared(source: Source) -> list[str]:
    """Differences between ``__all__`` and the public classes and functions of a module."""
    definitions = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    public = {n.name for n in source.tree.body if isinstance(n, definitions) and n.name[0] != "_"}
    assigned = {
        target.id
        for node in source.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    listed = set(module_all(source) or ())
    return [f"{source.path}: {name} is not in __all__" for name in sorted(public - listed)] + [
        f"{source.path}: {name} in __all__ is not defined here"
        for name in sorted(listed - public - assigned)
    ]


def test_the_public_names_are_pinned() -> None:
    assert asteria.__all__ == PUBLIC


def test_nothing_else_is_public() -> None:
    names = {
        name
        for name, value in vars(asteria).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert names == set(PUBLIC) - {"__version__"}


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_a_public_name_is_documented_and_knows_where_it_is_from(name: str) -> None:
    value = getattr(asteria, name)
    text = (vars(value).get("__doc__") if isinstance(value, type) else value.__doc__) or ""
    assert text.strip(), f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"{name} has only a generated docstring"
    assert value.__name__ == name
    assert value.__module__.startswith("asteria.")


def test_everything_public_has_a_docstring() -> None:
    missing = [line for source in sources("asteria") for line in undocumented(source)]
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_modules_say_what_they_offer() -> None:
    wrong = [
        line
        for source in sources("asteria")
        if not source.path.endswith("__init__.py")
        for line in misdeclared(source)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_function_is_annotated() -> None:
    bare = [
        f"{source.at(function)}: {function.name}"
        for source in sources("asteria")
        for function in functions(source)
        if function.returns is None
    ]
    assert not bare, "no return type:\n" + "\n".join(bare)


@pytest.mark.parametrize(("name", "bases"), ERRORS.items())
def test_the_error_tree(name: str, bases: tuple[type, ...]) -> None:
    assert getattr(errors, name).__bases__ == bases


def test_every_error_is_in_the_tree_and_exported() -> None:
    assert sorted(ERRORS) == sorted(errors.__all__)
    drawn = re.findall(r"^[├└│─ ]*(\w+Error)\b", errors.__doc__ or "", flags=re.MULTILINE)
    assert sorted(drawn) == sorted(ERRORS), "the drawing in asteria/errors.py"
    assert set(ERRORS) <= set(PUBLIC)


def test_the_package_is_typed() -> None:
    assert (ROOT / "asteria" / "py.typed").is_file()
    assert "py.typed" in pyproject()["tool"]["setuptools"]["package-data"]["asteria"]


def test_the_version_is_stated_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", asteria.__version__)
    assert "version" in pyproject()["project"]["dynamic"]
    dynamic = pyproject()["tool"]["setuptools"]["dynamic"]["version"]
    assert dynamic == {"attr": "asteria.version.__version__"}


def test_the_changelog_begins_with_this_version_or_with_what_is_unreleased() -> None:
    headings = changelog_headings((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert headings, "CHANGELOG.md has no '## [version]' headings"
    assert headings[0] in ("Unreleased", asteria.__version__)


def test_the_checks_find_what_they_look_for() -> None:
    text = (
        "__all__ = ['gone']\ndef f(): ...\nclass C:\n    def m(self): ...\n    def _p(self): ...\n"
    )
    source = parse(text)
    assert undocumented(source) == [
        "asteria/example.py: the module",
        "asteria/example.py:2: f",
        "asteria/example.py:3: C",
        "asteria/example.py:4: m",
    ]
    assert misdeclared(source) == [
        "asteria/example.py: C is not in __all__",
        "asteria/example.py: f is not in __all__",
        "asteria/example.py: gone in __all__ is not defined here",
    ]
    assert changelog_headings("# C\n## [Unreleased]\n### Added\n## [0.1.0] - 2026\n") == [
        "Unreleased",
        "0.1.0",
    ]

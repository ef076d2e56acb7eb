"""The repository's own source, parsed once, and what can be measured of it."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

ROOT = Path(__file__).resolve().parents[2]

Function = ast.FunctionDef | ast.AsyncFunctionDef

_SCALARS = frozenset({"int", "float", "str", "bool", "None"})


class Source(NamedTuple):
    """One Python file."""

    path: str
    """Relative to the repository."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name; a package's is that of its folder."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, node: ast.stmt | ast.expr | ast.excepthandler) -> str:
        """Where a node stands, as editors and terminals understand it."""
        return f"{self.path}:{node.lineno}"


@functools.cache
def sources(folder: str) -> tuple[Source, ...]:
    """All Python files under a folder of the repository."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT)
        if not any(part.startswith(".") for part in relative.parts):
            text = path.read_text(encoding="utf-8")
            found.append(Source(relative.as_posix(), text, ast.parse(text)))
    return tuple(found)


def parse(text: str, path: str = "asteria/example.py") -> Source:
    """A source that is not in the repository, to try the measures on."""
    return Source(path, text, ast.parse(text))


@functools.cache
def pyproject() -> dict[str, Any]:
    """The content of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lines(node: ast.stmt) -> int:
    """Lines of a definition, from its ``def`` or ``class`` to its end."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def functions(source: Source) -> Iterator[Function]:
    """All functions and methods, nested ones included."""
    return (
        n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def classes(source: Source) -> Iterator[ast.ClassDef]:
    """All classes, nested ones included."""
    return (node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef))


def is_scalar(annotation: ast.expr | None) -> bool:
    """Whether it is int, float, str, bool, a Literal, None, or a union of these."""
    match annotation:
        case ast.Constant(value=None):
            return True
        case ast.Constant(value=str() as text):
            return is_scalar(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return name in _SCALARS
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return is_scalar(left) and is_scalar(right)
        case ast.Subscript(value=ast.Name(id="Literal")):
            return True
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return is_scalar(inner)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            return all(map(is_scalar, members))
    return False


def wide_parameters(function: Function) -> list[str]:
    """Names of the parameters that are not scalars; ``self`` and ``cls`` do not count."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    if positional and positional[0].arg in ("self", "cls"):
        del positional[0]
    named = [*positional, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [argument.arg for argument in named if not is_scalar(argument.annotation)]


def has_decorator(function: Function, name: str) -> bool:
    """Whether a function is decorated with a plain name."""
    return any(isinstance(d, ast.Name) and d.id == name for d in function.decorator_list)


def module_all(source: Source) -> list[str] | None:
    """The names in ``__all__``, None if the module has none."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def changelog_headings(text: str) -> list[str]:
    """Names of the releases in a changelog, the newest first."""
    return re.findall(r"^## \[?([^\]\s]+)\]?", text, flags=re.MULTILINE)

"""Constructs that library code does without."""

import ast
from collections.abc import Callable

import pytest

from tests.architecture.sources import Source, parse, sources

BANNED_NAMES = {"utils", "util", "common", "misc", "base", "manager", "helpers"}
BROAD = {"Exception", "BaseException"}
BOUNDARIES = {
    "asteria/distributed/post.py",
    "asteria/refresh/job.py",
    "asteria/refresh/pool.py",
}
"""Where another thread ends: whatever happened there is kept for the thread that asked for it."""

Rule = Callable[[Source], list[str]]


def prints(source: Source) -> list[str]:
    return [
        source.at(node)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "breakpoint")
    ]


def asserts(source: Source) -> list[str]:
    return [source.at(node) for node in ast.walk(source.tree) if isinstance(node, ast.Assert)]


def _names(node: ast.expr | None) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} if node else set()


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def broad_excepts(source: Source) -> list[str]:
    """Handlers, or ``suppress``, of everything, unless it is raised again."""
    if source.path in BOUNDARIES:
        return []
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            everything = node.type is None or _names(node.type) & BROAD
            if everything and not _raises_again(node):
                found.append(source.at(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            if any(_names(argument) & BROAD for argument in node.args):
                found.append(source.at(node))
    return found


def global_statements(source: Source) -> list[str]:
    return [source.at(node) for node in ast.walk(source.tree) if isinstance(node, ast.Global)]


def vague_names(source: Source) -> list[str]:
    parts = {part.strip("_") for part in source.module.split(".")}
    return [f"{source.path}: {name}" for name in sorted(parts & BANNED_NAMES)]


RULES: list[tuple[str, Rule]] = [
    ("print and breakpoint are for programs", prints),
    ("assert is not for errors: raise a typed one", asserts),
    ("name the exception that is expected", broad_excepts),
    ("no state at module level", global_statements),
    ("name a module after its one subject", vague_names),
]


@pytest.mark.parametrize(("reason", "rule"), RULES)
def test_the_package_keeps_the_rule(reason: str, rule: Rule) -> None:
    offenders = [line for source in sources("asteria") for line in rule(source)]
    assert not offenders, f"{reason}:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    ("rule", "text", "count"),
    [
        (prints, "print(1)\nbreakpoint()\nlogger.print(1)\n", 2),
        (asserts, "def f(x):\n    assert x\n", 1),
        (broad_excepts, "try:\n    f()\nexcept:\n    pass\n", 1),
        (broad_excepts, "try:\n    f()\nexcept (ValueError, Exception):\n    pass\n", 1),
        (broad_excepts, "try:\n    f()\nexcept ValueError:\n    pass\n", 0),
        (broad_excepts, "try:\n    f()\nexcept Exception:\n    g()\n    raise\n", 0),
        (broad_excepts, "try:\n    f()\nexcept Exception as e:\n    raise X from e\n", 1),
        (broad_excepts, "with contextlib.suppress(BaseException):\n    f()\n", 1),
        (broad_excepts, "with suppress(KeyError):\n    f()\n", 0),
        (global_statements, "def f():\n    global x\n    x = 1\n", 1),
    ],
)
def test_the_rule_finds_what_it_looks_for(rule: Rule, text: str, count: int) -> None:
    assert len(rule(parse(text))) == count


@pytest.mark.parametrize(
    ("path", "vague"),
    [
        ("asteria/utils.py", True),
        ("asteria/linalg/_misc.py", True),
        ("asteria/common/modes.py", True),
        ("asteria/linalg/modes.py", False),
    ],
)
def test_vague_names_are_found_in_files_and_folders(path: str, vague: bool) -> None:
    assert bool(vague_names(parse("", path))) is vague

"""The limits that linters do not check: sizes, nesting, and things that may not stay in the tree."""

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ("avion_dali", "pipelines")
PRINTING = "avion_dali/cli/"
MAX_FILE_LINES, MEDIAN_FILE_LINES = 400, 180
MAX_FUNCTION_LINES, MEDIAN_FUNCTION_LINES = 60, 12
MAX_NESTING = 3

BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def python_files(*folders: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


SHIPPED = python_files(*LIBRARY, "train")
ALL = [*SHIPPED, *python_files("benchmarks", "tests")]


def functions(source: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]


def line_count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def nesting(node: ast.AST, *, is_elif: bool = False) -> int:
    """Deepest number of blocks inside each other; `elif` goes no deeper, an inner function starts anew."""
    own = int(isinstance(node, BLOCKS) and not is_elif)
    below = 0
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTIONS):
            chained = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
            below = max(below, nesting(child, is_elif=chained))
    return own + below


def open_ends(source: str) -> list[str]:
    """Comments that postpone work, and code that is not there yet."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        words = token.string.replace(":", " ").replace("(", " ").split()
        if token.type == tokenize.COMMENT and {"TODO", "FIXME", "XXX", "HACK"} & set(words):
            found.append(f"line {token.start[0]}: {token.string}")
        if token.type == tokenize.NAME and token.string == "NotImplementedError":
            found.append(f"line {token.start[0]}: {token.string}")
    return found


def broad_handlers(source: str) -> list[str]:
    """Handlers for everything, but for those that raise it again or whose line says `process boundary`."""
    lines, found = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        line = lines[node.lineno - 1].strip()
        caught = ast.unparse(node.type) if node.type else ""
        raises_again = bool(caught) and ast.unparse(node.body[-1]) == "raise"
        boundary = caught == "Exception" and re.search("(process|worker) boundary", line)
        if caught in ("", "Exception", "BaseException") and not raises_again and not boundary:
            found.append(f"line {node.lineno}: {line}")
    return found


def print_calls(source: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno


@pytest.mark.parametrize("name", ALL)
def test_sizes(name):
    source = (ROOT / name).read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for function in functions(source):
        where = f"{name}:{function.lineno} {function.name}"
        assert line_count(function) <= MAX_FUNCTION_LINES, where
        assert nesting(function) <= MAX_NESTING, where


def test_medians():
    sources = [(ROOT / name).read_text() for name in SHIPPED]
    assert statistics.median(len(s.splitlines()) for s in sources) <= MEDIAN_FILE_LINES
    lengths = [line_count(f) for s in sources for f in functions(s)]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize("name", ALL)
def test_nothing_left_open(name):
    source = (ROOT / name).read_text()
    if name != f"tests/{Path(__file__).name}":
        assert not open_ends(source)


@pytest.mark.parametrize("name", SHIPPED)
def test_errors_are_caught_by_name(name):
    assert not broad_handlers((ROOT / name).read_text())


@pytest.mark.parametrize("name", [n for n in python_files(*LIBRARY) if not n.startswith(PRINTING)])
def test_the_library_does_not_print(name):
    assert not list(print_calls((ROOT / name).read_text()))


CHAIN = """
def f(a):
    if a:
        pass
    elif a > 1:
        pass
    elif a > 2:
        pass
"""
NESTED = """
def f(a):
    for x in a:
        while x:
            with x:
                try:
                    pass
                finally:
                    pass
"""


def test_sizes_are_counted_right():
    assert nesting(functions(CHAIN)[0]) == 1
    assert nesting(functions(NESTED)[0]) == 4
    assert line_count(functions(NESTED)[0]) == 8


def test_open_ends_are_found():
    assert open_ends("x = 'TODO'  # note") == []
    assert open_ends("# TODO: later")
    assert open_ends("raise NotImplementedError")


def test_broad_handlers_are_found():
    handler = "try:\n    f()\nexcept{}:{}\n    {}"
    assert broad_handlers(handler.format("", "", "raise"))
    assert broad_handlers(handler.format(" Exception", "", "pass"))
    assert broad_handlers(handler.format(" BaseException", "  # the process boundary", "pass"))
    assert not broad_handlers(handler.format(" Exception", "  # the process boundary", "pass"))
    assert not broad_handlers(handler.format(" BaseException", "", "raise"))
    assert not broad_handlers(handler.format(" OSError", "", "pass"))


def test_prints_are_found():
    assert list(print_calls("log('a')\nprint('b')")) == [2]

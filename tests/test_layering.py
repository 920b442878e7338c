"""Imports point one way, no module needs itself, and what workers import stays light."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("avion_dali", "pipelines", "train")

# What each room of the library may import besides itself; "" is `avion_dali/__init__.py`, the bottom.
ALLOWED = {
    "": set(),
    "contracts": set(),
    "config": {"contracts", "wording"},
    "cores": set(),
    "child_process": {"contracts"},
    "subprocess_call": {"child_process"},
    "files": {"contracts"},
    "locks": {"contracts"},
    "time_limit": set(),
    "wording": set(),
    "data": set(),
    "datasets": {"data"},
    "decode": {"data"},
    "loading": {"data", "decode"},
    "inspection": {"data", "decode", "loading"},
    "models": set(),
    "metrics": set(),
    "device_ops": set(),
    "objectives": {"models", "metrics", "device_ops"},
    "engine": {"data", "models", "metrics", "device_ops", "objectives"},
    "report": {"engine"},
    "tasks": {"data", "models", "metrics", "device_ops", "objectives", "engine"},
    "inference": {"data", "models", "device_ops", "engine", "tasks"},
    "pipelines": {"data", "decode", "loading"},
    "assembly": {"data", "decode", "loading", "models", "device_ops", "engine", "tasks", "report", "pipelines"},
    "__main__": {"cli"},
    "cli": {
        *("data", "datasets", "decode", "loading", "inspection", "models", "metrics", "device_ops"),
        *("objectives", "engine", "tasks", "inference", "report", "assembly", "pipelines"),
    },
}
FOR_ALL = {
    "",
    "contracts",
    "config",
    "cores",
    "files",
    "locks",
    "time_limit",
    "wording",
    "child_process",
    "subprocess_call",
}
TOO_HEAVY = ("torch", "open_clip", "pyarrow", "jsonargparse")


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(p): p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))}
BENCHMARKS = {module_name(p): p for p in sorted((ROOT / "benchmarks").rglob("*.py"))}
TEST_MODULES = {path.stem for path in (ROOT / "tests").glob("*.py")}


def imported_names(node: ast.AST, module: str) -> Iterator[str]:
    """Dotted names that an import or a call of `pipelines_module` may load, the imported objects included."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            source = importlib.util.resolve_name("." * node.level + source, module.rpartition(".")[0])
        yield source
        yield from (f"{source}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pipelines_module":
        yield f"pipelines.{ast.literal_eval(node.args[0])}"


def runs_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements that run when the module is imported: neither function bodies nor typing-only blocks."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        waiting.extend(node.orelse if is_typing_only(node) else ast.iter_child_nodes(node))


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def room(name: str) -> str | None:
    """The room a dotted name lies in; None for what is not this project's."""
    top, _, rest = name.partition(".")
    if top == "avion_dali":
        first = rest.split(".")[0]
        return first if first in ALLOWED else ""
    return top if top in ("pipelines", "train", "benchmarks", "tests") else None


def wrong_way(module: str, source: str) -> list[str]:
    """Imports of a module, lazy ones and typing ones too, that its room may not have."""
    own = room(module)
    if own == "train":
        allowed = {*ALLOWED, "train"}
    else:
        allowed = ALLOWED[own] | {own}
        if own not in FOR_ALL:
            allowed |= FOR_ALL
    # The front door names the homes of what it offers for type checkers only, and imports them when asked.
    tree = ast.parse(source)
    nodes = runs_at_import(tree) if module == "avion_dali" else ast.walk(tree)
    names = {name for node in nodes for name in imported_names(node, module)}
    return sorted(name for name in names if room(name) is not None and room(name) not in allowed)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    assert not wrong_way(module, SOURCES[module].read_text())


def test_the_check_sees_every_kind_of_import():
    source = (
        "def f():\n    from avion_dali.engine import loop\nimport train.build\nfrom avion_dali import contracts"
    )
    assert wrong_way("avion_dali.data.order", source) == [
        "avion_dali.engine",
        "avion_dali.engine.loop",
        "train.build",
    ]
    assert wrong_way("train.pretrain", "import benchmarks.machine") == ["benchmarks.machine"]
    assert wrong_way("avion_dali.contracts", "import avion_dali.config") == ["avion_dali.config"]
    called = "from avion_dali.assembly.dali_room import pipelines_module\ndef f(): pipelines_module('graph')"
    assert wrong_way("avion_dali.cli.env", called) == []
    assert "pipelines.graph" in wrong_way("avion_dali.engine.loop", called)


def test_relative_imports_are_resolved():
    nodes = ast.walk(
        ast.parse("from .codecs import Device\nfrom . import graph\nfrom ..avion_dali import engine")
    )
    names = [name for node in nodes for name in imported_names(node, "a.pipelines.mini_clip_worker")]
    assert names == [
        *("a.pipelines.codecs", "a.pipelines.codecs.Device", "a.pipelines", "a.pipelines.graph"),
        *("a.avion_dali", "a.avion_dali.engine"),
    ]
    assert wrong_way("pipelines.mini_clip_worker", "from .codecs import Device") == []


def test_imports_are_relative_in_pipelines_and_absolute_elsewhere():
    """So `pipelines` works under whatever name it is installed."""
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [name.partition(".")[0] for name in imported_names(node, module)]
                is_own = "pipelines" in names and module.startswith("pipelines")
                assert bool(getattr(node, "level", 0)) == is_own, f"{module}, line {node.lineno}"


def test_every_room_is_in_the_table():
    rooms = {p.name for p in (ROOT / "avion_dali").iterdir() if (p / "__init__.py").exists()}
    files = {p.stem for p in (ROOT / "avion_dali").glob("*.py")} - {"__init__"}
    assert rooms | files == set(ALLOWED) - {"", "pipelines"}


def test_dali_is_imported_by_pipelines_only():
    for module, path in SOURCES.items():
        nodes = ast.walk(ast.parse(path.read_text()))
        tops = {name.split(".")[0] for node in nodes for name in imported_names(node, module)}
        assert "nvidia" not in tops or module.startswith("pipelines"), module


def runs(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements that run at all, in functions too; not those for type checkers alone."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.orelse if is_typing_only(node) else ast.iter_child_nodes(node))


def import_graph(sources: dict[str, str], *, lazy: bool = False) -> dict[str, set[str]]:
    """What each module imports of the others, when it is imported or, with `lazy`, at any time."""
    statements = runs if lazy else runs_at_import
    graph = {}
    for module, source in sources.items():
        names = {name for node in statements(ast.parse(source)) for name in imported_names(node, module)}
        graph[module] = (names & sources.keys()) - {module}
    return graph


@pytest.mark.parametrize("lazy", [False, True], ids=["at import", "at any time"])
def test_no_import_cycles(lazy):
    sources = {m: p.read_text() for m, p in {**SOURCES, **BENCHMARKS}.items()}
    TopologicalSorter(import_graph(sources, lazy=lazy)).prepare()


def foreign(source: str, unwanted: set[str], module: str = "") -> set[str]:
    """Imports, lazy ones too, of modules whose first name is unwanted."""
    names = {name for node in ast.walk(ast.parse(source)) for name in imported_names(node, module)}
    return {name for name in names if name.split(".")[0] in unwanted}


@pytest.mark.parametrize("module", BENCHMARKS)
def test_benchmarks_do_not_import_tests(module):
    assert not foreign(BENCHMARKS[module].read_text(), TEST_MODULES | {"tests"})


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_that_ships_imports_benchmarks_or_tests(module):
    assert not foreign(SOURCES[module].read_text(), TEST_MODULES | {"tests", "benchmarks"}, module)


def test_foreign_imports_are_found():
    source = "def f():\n    import mutations\nfrom benchmarks import media\nimport numpy"
    assert foreign(source, {"mutations", "benchmarks"}) == {"mutations", "benchmarks", "benchmarks.media"}


def test_the_graph_shows_cycles():
    cycle = {"a": "import b", "b": "from a import x"}
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(cycle)).prepare()
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\ndef f():\n    import a"
    assert import_graph({"a": "import b", "b": lazy}) == {"a": {"b"}, "b": set()}
    assert import_graph({"a": "import b", "b": lazy}, lazy=True) == {"a": {"b"}, "b": {"a"}}
    typing_only = lazy.partition("def f")[0]
    assert import_graph({"a": "import b", "b": typing_only}, lazy=True) == {"a": {"b"}, "b": set()}
    assert import_graph({"a": "import b", "b": "if True:\n    import a"})["b"] == {"a"}


def loaded_after_import(modules: list[str], unwanted: tuple[str, ...]) -> list[str]:
    """Import modules in a fresh interpreter and return what it loaded of the unwanted."""
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print(*sorted(set({unwanted!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_workers_import_nothing_heavy():
    modules = [m for m in SOURCES if m.startswith("avion_dali.decode.")]
    assert "avion_dali.decode.cpu_fused" in modules
    assert loaded_after_import(["avion_dali.loading.worker", *modules], TOO_HEAVY) == []


def test_entry_points_import_nothing_heavy():
    """A spawned worker imports the module that was started with `-m` once more."""
    started = [m for m, path in SOURCES.items() if m.startswith("train.") and "__main__" in path.read_text()]
    assert {"train.pretrain", "train.evaluate"} <= set(started)
    assert loaded_after_import([*started, "avion_dali.__main__"], TOO_HEAVY) == []


def test_the_overview_of_commands_imports_nothing_heavy():
    code = (
        "import sys\nfrom avion_dali.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        f"    print('loaded:', *sorted(set({TOO_HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded:", done


def test_the_import_check_sees_heavy_modules():
    assert loaded_after_import(["avion_dali.data.manifest"], TOO_HEAVY) == ["pyarrow"]

"""The README names every file and shows only commands that exist."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MAP_TITLE = "Where things are"


def files_to_name() -> list[str]:
    """All modules, recipes and benchmarks, relative to the repository."""
    modules = (p for top in ("avion_dali", "train", "pipelines") for p in (ROOT / top).rglob("*.py"))
    others = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "benchmarks").glob("*.py")]
    paths = sorted(p.relative_to(ROOT).as_posix() for p in (*modules, *others))
    return [path for path in paths if not path.endswith("__init__.py")]


def map_entries(readme: str) -> dict[str, str]:
    """Text of the map by folder. A folder's entry begins with its path, `path/`, at the start of a line."""
    found = re.search(rf"^#+ {MAP_TITLE}\s*$(.*?)(?=^##? |\Z)", readme, re.MULTILINE | re.DOTALL)
    pieces = re.split(r"^[\s#*|-]*`([\w./]+/)`", found.group(1) if found else "", flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def unnamed(readme: str, files: list[str]) -> list[str]:
    """Files that the entry of their folder does not name."""
    entries = map_entries(readme)
    folders = {path: path.rpartition("/") for path in files}
    return [
        path for path, (folder, _, name) in folders.items() if f"`{name}`" not in entries.get(f"{folder}/", "")
    ]


def shown_commands(readme: str) -> list[list[str]]:
    """Words of every command line in the code blocks; several on a line are taken apart."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    blocks = [text for language, text in fenced if language in ("", "bash", "sh", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&|\|\||;|\|", line.removeprefix("$ "))]
    return [words for part in parts if (words := split_words(part))]


def split_words(command: str) -> list[str]:
    """Words as a shell sees them; what is no shell command (shown output, say) is split at spaces."""
    try:
        return shlex.split(command, comments=True)
    except ValueError:
        return command.split()


def module_exists(name: str) -> bool:
    """Whether `python -m name` from the repository's root would find something."""
    path = ROOT.joinpath(*name.split("."))
    if (ROOT / name.split(".")[0]).is_dir():
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return find_spec(name) is not None


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def subcommand_exists(name: str) -> bool:
    """Whether `avion-dali name --help` succeeds."""
    from train import cli

    try:
        status = cli.main([name, "--help"])
    except SystemExit as end:
        status = end.code
    return not status


def after(words: list[str], word: str) -> list[str]:
    """The word that follows another one; empty when there is none."""
    return words[words.index(word) + 1 :][:1] if word in words else []


def unknown(words: list[str]) -> list[str]:
    """What a command names that does not exist."""
    program = words[0].rpartition("/")[2]
    if program == "make":
        targets = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
        return [target for target in targets if target not in make_targets()]
    if program == "avion-dali":
        return [name for name in words[1:2] if not name.startswith("-") and not subcommand_exists(name)]
    runs_module = program.startswith("python") or program == "torchrun" or "-m" in words
    return [name for name in after(words, "-m") if runs_module and not module_exists(name)]


def test_the_readme_names_every_file():
    assert unnamed(README.read_text(), files_to_name()) == []


@pytest.mark.parametrize("words", shown_commands(README.read_text()), ids=" ".join)
def test_the_readme_shows_existing_commands(words):
    assert unknown(words) == []


def test_a_missing_file_is_found():
    readme = (
        "# X\n## Where things are\n- `a/`: one\n  - `b.py` does\n- `c/` two - `b.py`\n## Next\n`a/` `d.py`\n"
    )
    assert unnamed(readme, ["a/b.py", "c/b.py"]) == []
    assert unnamed(readme, ["a/d.py", "c/e.py", "f/b.py"]) == ["a/d.py", "c/e.py", "f/b.py"]
    assert unnamed("", ["a/b.py"]) == ["a/b.py"]


def test_unknown_commands_are_found():
    lines = (
        "$ make test PYTHON=python3.12 && make nonsense  # make more\npython -m train.pretrain \\\n  --seed 1"
    )
    block = f"```bash\n{lines}\n```"
    assert [unknown(words) for words in shown_commands(block)] == [[], ["nonsense"], []]
    assert unknown(["torchrun", "--nproc_per_node=2", "-m", "train.absent", "--config", "c"]) == [
        "train.absent"
    ]
    assert unknown(["OMP_NUM_THREADS=1", ".venv/bin/python", "-m", "benchmarks.absent"]) == [
        "benchmarks.absent"
    ]
    assert unknown([".venv/bin/python", "-m", "pytest"]) == []
    assert unknown(["git", "clone", "somewhere"]) == []

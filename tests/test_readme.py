"""The README names every folder of code and shows only commands that exist."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MAP_TITLE = "Where things are"


def folders_to_name() -> list[str]:
    """All folders that hold code or recipes, relative to the repository."""
    tops = ("avion_dali", "train", "pipelines", "benchmarks")
    packages = {p.parent for top in tops for p in (ROOT / top).rglob("*.py")}
    return sorted(f"{p.relative_to(ROOT).as_posix()}/" for p in {*packages, ROOT / "configs"})


def unnamed(readme: str, folders: list[str]) -> list[str]:
    """Folders without an entry in the map; an entry begins with its path, `path/`, at the start of a line."""
    found = re.search(rf"^#+ {MAP_TITLE}\s*$(.*?)(?=^##? |\Z)", readme, re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^[\s#*|-]*`([\w./]+/)`", found.group(1) if found else "", flags=re.MULTILINE)
    return [folder for folder in folders if folder not in entries]


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
    from avion_dali.cli import main as cli

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
    if "avion_dali" in after(words, "-m"):
        return [name for name in after(words, "avion_dali") if not subcommand_exists(name)]
    runs_module = program.startswith("python") or program == "torchrun" or "-m" in words
    return [name for name in after(words, "-m") if runs_module and not module_exists(name)]


def test_the_readme_names_every_folder():
    assert unnamed(README.read_text(), folders_to_name()) == []


@pytest.mark.parametrize("words", shown_commands(README.read_text()), ids=" ".join)
def test_the_readme_shows_existing_commands(words):
    assert unknown(words) == []


def test_a_missing_folder_is_found():
    readme = "# X\n## Where things are\n- `a/`: one\n  - `a/b/` does\n## Next\n- `c/` two\n"
    assert unnamed(readme, ["a/", "a/b/"]) == []
    assert unnamed(readme, ["a/", "c/", "d/"]) == ["c/", "d/"]
    assert unnamed("", ["a/"]) == ["a/"]


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
    assert unknown(["torchrun", "--nproc_per_node=2", "-m", "avion_dali", "absent", "-x"]) == ["absent"]
    assert unknown(["python", "-m", "avion_dali", "recipes"]) == []
    assert unknown([".venv/bin/python", "-m", "pytest"]) == []
    assert unknown(["git", "clone", "somewhere"]) == []

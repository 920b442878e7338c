"""Parses command lines into typed dataclasses, and shows errors. Workers import it, so it imports little."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from avion_dali.config.recipe_files import find_recipe
from avion_dali.contracts import UserError
from avion_dali.wording import printable

Options = TypeVar("Options")


def parse_options(
    options: type[Options], argv: Sequence[str] | None, *, prog: str, description: str
) -> Options:
    """Fill a dataclass from `--config RECIPE` and `--field value`, `--section.field value`.

    Args:
        options: the dataclass; its docstring is the help of each field.
        argv: arguments; None uses the arguments of the process.
        prog: name of the command in the help.
        description: first line of the help.

    Raises:
        UserError: names the key and its allowed values.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="a recipe or a YAML file; later arguments override it"
    )
    parser.add_class_arguments(options)
    arguments = _with_recipes(_underscored(argv))
    try:
        with parameters_as_keys(options):
            return _filled(parser, options, arguments=arguments)
    except ArgumentError as error:
        explained = _explain(str(error), options, files=_config_files(arguments))
        raise UserError(f"{explained}\n{prog} --help lists every option") from None
    except (TypeError, UnicodeDecodeError) as error:  # jsonargparse raises these for a malformed file
        raise UserError(f"the configuration file is malformed, perhaps an empty section: {error}") from None


def _filled(parser: Any, options: type[Options], *, arguments: list[str]) -> Options:
    values = vars(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config", None)
    return options(**values)


def _underscored(argv: Sequence[str] | None) -> list[str]:
    """Accept `--output-dir` for `--output_dir`, since options usually have dashes and fields underscores."""
    arguments = sys.argv[1:] if argv is None else argv
    return [re.sub(r"^--[\w.-]+", lambda m: "--" + m.group()[2:].replace("-", "_"), a) for a in arguments]


def _with_recipes(arguments: list[str]) -> list[str]:
    """Replace each recipe that `--config` names by its file."""
    found: list[str] = []
    for argument in arguments:
        option, assigned, named = argument.partition("=")
        if found[-1:] == ["--config"]:
            found.append(str(find_recipe(argument)))
        elif option == "--config" and assigned:
            found.append(f"--config={find_recipe(named)}")
        else:
            found.append(argument)
    return found


def _config_files(arguments: list[str]) -> str:
    """Name the files that `--config` gives."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return " or ".join(
        argument.removeprefix("--config=")
        for before, argument in pairs
        if before == "--config" or argument.startswith("--config=")
    )


def _explain(message: str, options: type, *, files: str) -> str:
    """Add the allowed keys to a message about an unknown key, and simplify type names."""
    where = f" in {files}" if files else ""
    unknown = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown:
        section, key = unknown.groups()
        return f"unknown key {section}.{key}{where}; {section} has: {', '.join(_keys(options, section))}"
    unknown = re.search(r"Option '([\w.]+)' is not accepted", message)
    if unknown:
        return f"unknown key {unknown.group(1)}{where}; top-level keys are: {', '.join(_keys(options, ''))}"
    unknown = re.search(r"(?:Unrecognized|unrecognized) (?:arguments|options?|keys?):? *(.*)", message)
    if unknown:
        section = _section(options, unknown.group(1))
        if section:
            return f"unknown argument {unknown.group(1)}; {section} has: {', '.join(_keys(options, section))}"
        return f"unknown argument {unknown.group(1)}; top-level keys are: {', '.join(_keys(options, ''))}"
    return re.sub(r"typing\.Literal|<class '(\w+)'>", lambda m: m.group(1) or "one of ", message)


def _section(options: Any, argument: str) -> str:
    """Return the innermost section of an argument such as `--model.sizee=tiny`; empty for none."""
    found: list[str] = []
    for name in re.split(r"[\s=]", argument.lstrip("-"), maxsplit=1)[0].split("."):
        section = ".".join([*found, name])
        if name not in _keys(options, ".".join(found)) or not _is_section(options, section):
            break
        found.append(name)
    return ".".join(found)


def _is_section(options: Any, section: str) -> bool:
    return dataclasses.is_dataclass(_below(options, section))


def _keys(options: Any, section: str) -> list[str]:
    """Return the field names of a (nested) section of a dataclass."""
    return [field.name for field in dataclasses.fields(_below(options, section))]


def _below(options: Any, section: str) -> Any:
    """Return the factory or type of a (nested) field of a dataclass; for a section, this is a dataclass."""
    for name in filter(None, section.split(".")):
        field = next(f for f in dataclasses.fields(options) if f.name == name)
        options = field.default_factory if field.default_factory is not dataclasses.MISSING else field.type
    return options


@contextmanager
def parameters_as_keys(options: type) -> Iterator[None]:
    """Replace names of function parameters in errors by keys of a configuration.

    The library writes names of parameters between backticks. A field of a section becomes `section.field`, a
    field of the dataclass itself becomes `--field`; other names do not change.

    Args:
        options: the dataclass that the command line fills.

    Yields:
        Nothing.
    """
    try:
        yield
    except UserError as error:
        keys = parameter_keys(options)
        error.args = (re.sub(r"`(\w+)`", lambda match: keys.get(match[1], match[0]), str(error)),)
        raise


def parameter_keys(options: Any) -> dict[str, str]:
    """Return the key or option of every field of a configuration by the field's name.

    Args:
        options: the dataclass.
    """
    sections = [name for name in _keys(options, "") if _is_section(options, name)]
    keys = {field: f"{name}.{field}" for name in sections for field in _keys(options, name)}
    own = {name: f"--{name.replace('_', '-')}" for name in _keys(options, "") if name not in sections}
    # A training names the batch of one rank otherwise than `open_clips` does.
    return {"batch_size": "optim.micro_batch", **keys, **own}


class _PrintableLines(logging.Formatter):
    """Messages alone; what a file says in them cannot act on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


def _show_messages() -> None:
    """Print the library's log messages to the console, one line each."""
    logger, handler = logging.getLogger("avion_dali"), logging.StreamHandler()
    handler.setFormatter(_PrintableLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it, which ends with a long traceback that then shows it.

    See PyTorch's documentation, "Error Propagation" of torch.distributed.elastic.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": f"error: {message}", "timestamp": int(time.time())}))


def _set_up_torch() -> None:
    """Set what torch reads from the environment once, when it is imported or first uses a GPU."""
    # OpenMP's threads wait for each other by spinning, which takes cores from decode workers: a CPU training
    # with one worker on two cores was a fifth faster with less spinning.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Segments of GPU memory that can grow leave no gaps between tensors of different sizes. In torch the older
    # name of the variable has precedence.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def run_command(main: Callable[[], int | None]) -> None:
    """Run an entry point; a `UserError` becomes one message and exit status 2.

    Args:
        main: returns the exit status, None for 0.
    """
    _set_up_torch()
    _show_messages()
    try:
        status = main() or 0
    except UserError as error:
        message = printable(str(error))
        print(f"error: {message}", file=sys.stderr)
        _tell_torchrun(message)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)

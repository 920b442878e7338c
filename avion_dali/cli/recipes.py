"""`avion-dali recipes`: lists the recipes that `--config` accepts by name, or prints some of them."""

from __future__ import annotations

import argparse

from avion_dali.config.recipe_files import find_recipe, recipe_names, recipes_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser: parser of the subcommand.
    """
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes to print (default: list all recipes)")


def run(options: argparse.Namespace) -> int:
    """List all recipes, or print some of them.

    Args:
        options: parsed arguments.
    """
    for name in options.names:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
    if not options.names:
        lines = [line for name in recipe_names() for line in description(name)]
        note = "`avion-dali recipes NAME` prints a recipe; its header says which command runs it."
        print("\n".join([*lines, "", note]))
    return 0


def description(name: str) -> list[str]:
    """Return lines with the purpose and the hardware of a recipe, from the header of its file.

    Args:
        name: name of the recipe.
    """
    header = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    hardware = next(line for line in header if line.startswith("# Hardware: "))
    return [name, *(f"    {line.removeprefix('# ')}" for line in (header[0], hardware))]

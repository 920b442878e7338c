"""Finds recipes: the YAML files in `configs/`, which an installed wheel contains as `avion_dali/recipes/`."""

from __future__ import annotations

from pathlib import Path

from avion_dali.contracts import UserError

_LIBRARY = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Return the folder of the recipes, in an installed wheel or in a checkout."""
    installed = _LIBRARY / "recipes"
    return installed if installed.is_dir() else _LIBRARY.parent / "configs"


def recipe_names() -> list[str]:
    """Return the sorted names of all recipes, which are their file names without `.yaml`."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(named: str) -> Path:
    """Return the file that `--config` names.

    Args:
        named: a file; or a recipe as `pretrain_tiny`, `pretrain_tiny.yaml` or `configs/pretrain_tiny.yaml`. An
            existing file takes precedence over a recipe of the same name.

    Raises:
        UserError: when there is neither such a file nor such a recipe; lists all recipes.
    """
    path = Path(named)
    if path.is_file():
        return path
    recipe = recipes_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent in (Path("."), Path("configs")) and recipe.is_file():
        return recipe
    raise UserError(
        f"--config {named}: there is no such file and no such recipe; recipes are: {', '.join(recipe_names())}"
    )

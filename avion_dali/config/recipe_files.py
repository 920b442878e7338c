"""Finds recipes, the YAML files of `configs/`, which an installed wheel holds as `avion_dali/recipes/`."""

from __future__ import annotations

from pathlib import Path

from avion_dali.contracts import UserError

_LIBRARY = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Return the folder of the recipes: inside an installed wheel, or `configs/` of a checkout."""
    installed = _LIBRARY / "recipes"
    return installed if installed.is_dir() else _LIBRARY.parent / "configs"


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted: their file names without `.yaml`."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(named: str) -> Path:
    """Return the file that `--config` names.

    Args:
        named: a file; or a recipe as `pretrain_tiny`, `pretrain_tiny.yaml` or `configs/pretrain_tiny.yaml`.
            A file that exists is preferred to a recipe of the same name.

    Raises:
        UserError: when there is neither such a file nor such a recipe; lists the recipes.
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

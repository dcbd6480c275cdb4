"""Loading auto-encoders, with their decoders: from a run, an imported folder, an official checkpoint, or
ViTMAE."""

import re
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, ConfigError
from ..methods import METHODS
from ..methods.mae import MAE, MAERecipe, MAESettings
from ..methods.recipes import load_recipe
from ..models.autoencoder import Autoencoder, build
from .huggingface import Folder, model_type, read_folder
from .official import autoencoder
from .weights import KINDS, State, mismatches, read_weights, weights_of_run


def load_autoencoders(
    path: Path, heads: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> tuple[dict[str, Autoencoder], MAESettings]:
    """The auto-encoders of a source by the names of their networks (student, teacher), in evaluation mode,
    and the settings of their training, which are MAE's defaults where the source does not tell.

    `heads` (encoder, decoder) and `size` are for official weights, as in `official.shape_of`. Raises
    CheckpointError or ConfigError, also for methods that reconstruct no pixels.
    """
    run = run_of(path)
    if run is not None:
        models, settings = _of_run(run)
    elif path.is_dir() and model_type(path):
        folder = read_folder(path)
        networks = {"student": folder.weights.student}
        models = {k: autoencoder(v, folder.heads, folder.size)[0] for k, v in networks.items()}
        settings = mae_settings(folder)
    elif path.is_file() and path.name.endswith(KINDS):
        weights = read_weights(path)
        states: dict[str, State | None] = {"student": weights.student, "teacher": weights.teacher}
        models = {k: autoencoder(v, heads, size)[0] for k, v in states.items() if v is not None}
        settings = MAESettings()
    else:
        raise CheckpointError(
            f"{path} has no decoder: give a run of mae or rcmae, a folder of `rcmae import`, an official "
            ".pth, or a ViTMAE of transformers"
        )
    return {name: model.eval() for name, model in models.items()}, settings


def mae_settings(folder: Folder) -> MAESettings:
    """The settings with which a ViTMAE was trained, by its config.json."""
    target: Literal["normalized", "pixels"] = "normalized" if folder.config.get("norm_pix_loss") else "pixels"
    return MAESettings(mask_ratio=float(folder.config.get("mask_ratio", 0.75)), target=target)


def run_of(path: Path) -> Path | None:
    """The run, or imported folder, that `path` is or in whose export/ it is; None for other sources."""
    path = path.absolute()
    runs = [path, *(p.parent for p in (path, *path.parents[:2]) if p.name == "export")]
    return next((run for run in runs if (run / "recipe.toml").is_file()), None)


def _of_run(run: Path) -> tuple[dict[str, Autoencoder], MAESettings]:
    if not re.search(r"(?m)^method *=", (run / "recipe.toml").read_text(encoding="utf-8", errors="replace")):
        raise CheckpointError(
            f"{run} is a run without a decoder, as of fine-tuning; give one of mae or rcmae"
        )
    recipe = load_recipe(str(run / "recipe.toml"))
    if not issubclass(METHODS[recipe.method], MAE) or not isinstance(recipe, MAERecipe):
        raise ConfigError(f"{run} is a run of {recipe.method}, which has no decoder of pixels")
    file, weights = weights_of_run(run)
    models = {}
    for network in METHODS[recipe.method].networks:
        prefix = "student." if network == "student" else f"{network}.model."
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        model = build(recipe.images, recipe.network)
        if problems := mismatches(state, model.state_dict()):
            raise CheckpointError(f"{file} does not fit {run / 'recipe.toml'}: {network} {problems}")
        model.load_state_dict(state)
        models[network] = model
    return models, recipe.mae

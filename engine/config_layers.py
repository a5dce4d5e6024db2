"""The layers of a configuration: a file, its chain of parents, and what was typed over them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import losses
from engine import config_file, config_text
from loaders.errors import ConfigError


@dataclass
class Layer:
    """Values, and the file that holds them; None: they were typed."""

    values: DictConfig
    file: Path | None = None
    scalars: list[tuple[str, str, Any]] | None = None  # see `config_text.plain_scalars`


def read(path: Path, overrides: Sequence[str], run: type) -> list[Layer]:
    """All layers, later ones win: the oldest parent first, `path`, then the overrides in order.

    Args:
        run: dataclass of the whole configuration.

    Raises:
        ConfigError: unreadable file, circular `base`, an override that cannot be read, or a text
            that YAML took for something else.
    """
    files = _chain(path, ())
    loss = _method_config(files, overrides, run)
    for layer in files:
        try:
            config_text.keep_text(layer.values, layer.scalars, run, loss)
        except ConfigError as error:
            raise ConfigError(f"{layer.file}: {error}") from None
    return [*files, *(Layer(config_text.typed(text, run, loss)) for text in overrides)]


def _method_config(files: list[Layer], overrides: Sequence[str], run: type) -> type | None:
    """`Config` of the method that `loss.name` names; None for an unknown one, refused later.

    None, too, where no option of a method is given: to import a method takes torch.
    """
    layers = [layer.values for layer in files]
    named = [text for text in overrides if text.partition("=")[0] in ("loss", "loss.name")]
    layers += [config_text.typed(text, run) for text in named]
    name = "unicl"
    options = any(text.startswith("loss.") for text in overrides if text not in named)
    for layer in layers:
        loss = OmegaConf.to_container(layer).get("loss")
        if isinstance(loss, dict):
            options = options or bool(loss.keys() - {"name"})
            name = loss["name"] if isinstance(loss.get("name"), str) else name
    return losses.find(name).Config if options and name in losses.names() else None


def _chain(path: Path, seen: tuple[Path, ...]) -> list[Layer]:
    values, scalars = config_file.read(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` goes round in a circle")
    base = OmegaConf.to_container(values).get("base")
    if "base" in values:
        del values["base"]
    layer = Layer(values, path, [scalar for scalar in scalars if scalar[0] != "base"])
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base={base!r} is not the name of another file")
    if not base:
        return [layer]
    try:
        parent = path.parent / os.path.expanduser(base)
        return [*_chain(parent, (*seen, path.resolve())), layer]
    except ConfigError as error:
        raise ConfigError(f"{error} (the base of {path})") from None

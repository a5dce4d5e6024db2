"""Paths of a configuration: home folders, and where a relative path begins.

One rule. A relative path is looked for in the current folder. If it is not there and it stands in
a configuration file (or is a default), it is looked for in the folder of that file, then in the
root of this repository; the first that exists is meant. A path that was typed is looked for in the
current folder alone, and so are `output_dir`, which is written, and the names of models and
tokenizers, as Hugging Face reads them. `~` at the start of a path is the home folder.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine.config_layers import Layer
from loaders import manifest, specs, texts
from loaders.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATIONS = ("data.image_label", "data.image_text")


def settle(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    """Write into `cfg` the paths that are meant, where they are not what stands there.

    Raises:
        ConfigError: an address of a network in place of a path; a DeepSpeed file or file of
            templates that is nowhere, with the places that were tried.
    """
    cfg_values = OmegaConf.to_container(cfg, resolve=True)
    changed: dict[str, Any] = {"output_dir": _local(cfg.output_dir, "output_dir")}
    changed["deepspeed"] = _file(cfg.deepspeed, "deepspeed", layers)
    if cfg.data.templates not in texts.presets():
        changed["data.templates"] = _file(cfg.data.templates, "data.templates", layers)
    changed |= _sources(cfg_values, layers)
    changed["model"] = model = _at_home(cfg_values["model"])
    if reference := model.get("reference"):
        places = _places("model.reference.folder", layers)
        reference["folder"] = _specification(reference["folder"], "model.reference.folder", places)
    for key, value in changed.items():
        section, _, name = key.rpartition(".")
        before = cfg_values[section][name] if section else cfg_values[name]
        if value != before:
            OmegaConf.update(cfg, key, value, merge=False)


def require_data(values: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Refuse data that is not there; opens no tar.

    Args:
        values: of the whole configuration. layers: where they come from.

    Raises:
        DataError: a folder or tar of one of SPECIFICATIONS is missing. ConfigError: an address.
    """
    for key, found in _sources(values, layers).items():
        for spec in [found] if isinstance(found, str) else found:
            with named(key, spec):
                manifest.shard_paths(spec)


def _sources(values: dict[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
    """The data specifications that are meant, by key; others than texts are refused later."""
    found: dict[str, Any] = {}
    for key in SPECIFICATIONS:
        value = values["data"][key.removeprefix("data.")]
        places = _places(key, layers)
        if isinstance(value, str):
            found[key] = _specification(value, key, places)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            found[key] = [_specification(item, key, places) for item in value]
    return found


@contextmanager
def named(key: str, spec: str) -> Iterator[None]:
    """A `DataError` about the data specification `spec` names its key, and where was looked."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}{advice(spec)}") from None


def advice(spec: str) -> str:
    """Where a part of a data specification that is nowhere was looked for; else nothing."""
    parts = [part for part in spec.split("::") if part and not specs.exists(part)]
    if all(os.path.isabs(part) for part in parts):
        return ""
    return (
        f"; a relative path is looked for in {Path().absolute()}, and one that stands in a "
        f"configuration file then in the folder of that file and in {ROOT}"
    )


def _places(key: str, layers: Sequence[Layer]) -> list[Path]:
    """Folders in which a relative path of this key is looked for; the first is the current one."""
    unset = object()
    for layer in reversed(layers):
        if OmegaConf.select(layer.values, key, default=unset) is not unset:
            if layer.file is None:
                return [Path()]
            return [Path(), layer.file.absolute().parent, ROOT]
    return [Path(), ROOT]


def _local(path: str, key: str) -> str:
    try:
        return specs.local(path)
    except DataError as error:
        raise ConfigError(f"{key}={error}") from None


def _from(place: Path, path: str) -> str:
    return path if place == Path() else os.path.join(place, path)


def _file(path: str, key: str, layers: Sequence[Layer]) -> str:
    path, places = _local(path, key), _places(key, layers)
    for place in places:
        if (place / path).is_file():
            return _from(place, path)
    tried = ", ".join(str(place.absolute() / path) for place in places)
    preset = f"one of {', '.join(texts.presets())} or " if key == "data.templates" else ""
    raise ConfigError(f"{key}={path}: give {preset}a file that exists; tried: {tried}")


def _specification(text: str, key: str, places: Sequence[Path]) -> str:
    """A data specification; a part that is nowhere stays, for `loaders.specs` to say what lacks."""
    parts = []
    for part in text.split("::"):
        local = _local(part, key) if part else part
        found = (place for place in places if local and specs.exists(_from(place, local)))
        parts.append(_from(next(found, Path()), local))
    return "::".join(parts)


def _at_home(value: Any) -> Any:
    """The model section with `~/…` spelled out: weights, encoder and tokenizer folders."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value

"""Reading one YAML file of a configuration.

OmegaConf's loader builds nothing but plain values and refuses keys that stand twice. Refused here
besides is what `models.plain_yaml` refuses, where a slip would go unnoticed or cost all memory.
"""

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from engine import config_text
from loaders.errors import ConfigError
from models import plain_yaml


def read(path: Path) -> tuple[DictConfig, list[tuple[str, str, Any]]]:
    """The mapping in a file, `${…}` left as it is, and its `config_text.plain_scalars`.

    Raises:
        ConfigError: names the file: not a regular file, too large, no YAML, no mapping, or with
            aliases, object tags or duplicate keys.
    """
    try:
        text = plain_yaml.read_text(path)
        node = yaml.compose(text, Loader=plain_yaml.Loader)
        layer = OmegaConf.load(io.StringIO(text))
        scalars = config_text.plain_scalars(node, OmegaConf.to_container(layer))
    except Exception as error:  # of the file system, of YAML's constructors, and of OmegaConf
        raise ConfigError(f"cannot read configuration {path}: {error}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: a configuration is a mapping of sections")
    return layer, scalars

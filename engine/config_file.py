"""Reading one YAML file of a configuration that a stranger may have written.

OmegaConf's loader already builds nothing but plain values and refuses keys that stand twice.
Refused here is what is small in the file and large in memory.
"""

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from engine import config_text
from loaders.errors import ConfigError

MAX_BYTES = 1 << 17
# Each may stand for a value that holds others: 20 can grow 1500-fold, 100 without end.
MAX_INTERPOLATIONS = 20
MAX_DEPTH = 40  # PyYAML takes time with the square of it; ours go to 5
_NUMBER = re.compile(r"[-+.:_0-9a-fA-FxXoO]*")


def read(path: Path) -> tuple[DictConfig, list[tuple[str, str, Any]]]:
    """The mapping in a file, `${…}` left as it is, and its `config_text.plain_scalars`.

    Raises:
        ConfigError: names the file: not a regular file, too large, no YAML, no mapping, or with
            aliases, object tags, duplicate keys or endless numbers.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        _check_events(text)
        layer = OmegaConf.load(io.StringIO(text))
        scalars = config_text.plain_scalars(text, OmegaConf.to_container(layer))
    except Exception as error:  # of the file system, of YAML's constructors, and of OmegaConf
        raise ConfigError(f"cannot read configuration {path}: {error}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: a configuration is a mapping of sections")
    return layer, scalars


def check_values(values: Any) -> None:
    """Refuse what no setting can mean, in a container with `${…}` left as it is.

    Raises:
        ConfigError: names the key of a number that is not finite or exceeds 64 bits, or there
            are more than MAX_INTERPOLATIONS `${…}`.
    """
    interpolations = 0
    for key, value in _leaves(values, ""):
        if isinstance(value, str):
            interpolations += value.count("${")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{key}: a number of {value.bit_length()} bits; 63 are the most")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value}: a number must be finite; null may mean 'none'")
    if interpolations > MAX_INTERPOLATIONS:
        raise ConfigError(
            f"{interpolations} interpolations ${{…}}, more than {MAX_INTERPOLATIONS}; write the "
            "values out"
        )


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"{where}: more than {MAX_DEPTH} sections inside of each other")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"{where}: the alias *{event.anchor}: a few lines of them can stand for gigabytes; "
                "refer to another value as ${section.key}"
            )
        if "python/" in (getattr(event, "tag", None) or ""):
            raise ValueError(f"{where}: the object tag {event.tag}; write a plain value")
        plain = isinstance(event, yaml.ScalarEvent) and event.style is None
        if plain and len(event.value) > 300 and _NUMBER.fullmatch(event.value):
            raise ValueError(f"{where}: a number of {len(event.value)} characters")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping or list."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in pairs:
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value

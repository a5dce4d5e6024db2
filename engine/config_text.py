"""Texts of a configuration keep their characters: `name=007` is not 7, `runs/a #1` not `runs/a`.

YAML reads `20241127_123200` as a number and ` #1` as a comment. So a value that is typed, as
`key=value` or behind a flag, is read by the type of its key: text as it was typed, everything else
by YAML. Two readings are left: a pair of quotes around the whole value is taken off, and `null`
means none where a key may be none. In a file, and in a typed mapping such as `model={…}`, YAML's
rules hold; a text that YAML reads as something else is refused where characters would be lost.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from yaml.reader import Reader

from loaders.errors import ConfigError
from models.config import ModelConfig

# Annotated `Any` because OmegaConf has no type for it: a text, a list of texts, or none.
TEXT_OR_LIST = ("data.image_label", "data.image_text", "log.report_to")
_ENTRY = re.compile(
    r"""\s*'[^']*'\s*(?=,|$)|\s*"[^"]*"\s*(?=,|$)|(?:\{[^{}]*\}|\[[^][]*\]|[^,])+"""
)


def kinds(key: str, run: type, loss: type | None) -> set[Any]:
    """The types that the value of a dotted key may have; empty where no dataclass says it.

    Args:
        run: dataclass of the whole configuration. loss: the method's `Config`, of `loss.*`.
    """
    if key in TEXT_OR_LIST:
        return {str, list, NoneType}
    if key == "loss.name":
        return {str}
    parts = re.split(r"[.\[]", key.replace("]", ""))
    found: set[Any] = {run}
    if len(parts) > 1 and parts[0] in ("model", "loss"):  # checked by dataclasses of their own
        found = {ModelConfig if parts.pop(0) == "model" else loss}
    for part in parts:
        below: Any = None
        for kind in found:
            if dataclasses.is_dataclass(kind):
                below = get_type_hints(kind).get(part)
            elif get_origin(kind) in (dict, Mapping):
                below = get_args(kind)[1]
        if below in (None, Any):
            return set()
        found = set(get_args(below)) if get_origin(below) in (Union, UnionType) else {below}
    return {list if kind == list[str] else kind for kind in found}


def typed(override: str, run: type, loss: type | None = None) -> DictConfig:
    """The layer of one `key.sub=value`; `run` and `loss` as in `kinds`.

    Raises:
        ConfigError: not of this form, no YAML where YAML is read, or no text where one is needed.
    """
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    known = kinds(key, run, loss)
    try:
        if known & {str, list}:
            return _layer(key, _text(key, text, known))
        layer = OmegaConf.from_dotlist([override])
        value = OmegaConf.select(layer, key)
        if not known and isinstance(value, str):
            return _layer(key, _unquoted(text))  # YAML, too, takes it for a text
        if OmegaConf.is_config(value):
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            keep_text(layer, plain_scalars(node, OmegaConf.to_container(value), key), run, loss)
        return layer
    except ConfigError:
        raise
    except Exception as error:  # of YAML's constructors, and of OmegaConf for the key
        raise ConfigError(f"override {override!r}: {error}") from None


def plain_scalars(node: yaml.Node | None, values: Any, key: str = "") -> list[tuple[str, str, Any]]:
    """(key, characters, value) of what YAML holds without quotes and was read as no text.

    Args:
        node: what PyYAML composes. values: the container that it was read as. key: where it is.
    """
    return list(_scalars(node, values, key))


def keep_text(
    layer: DictConfig, scalars: list[tuple[str, str, Any]], run: type, loss: type | None
) -> None:
    """Make texts of the values that YAML read as numbers or truth values, in place.

    Raises:
        ConfigError: the text that YAML's value gives is not what stands there.
    """
    for key, characters, value in scalars:
        known = kinds(key, run, loss)
        if value is None or not known & {str, list}:
            continue
        if str(value) != characters:
            raise ConfigError(
                f"{key} is a text, and YAML reads {characters} as {value!r}; write it in quotes: "
                f"'{characters}'"
            )
        if not OmegaConf.is_list(OmegaConf.select(layer, key)):
            OmegaConf.update(layer, key, characters)


def _layer(key: str, value: Any) -> DictConfig:
    layer = OmegaConf.create()
    OmegaConf.update(layer, key, value)
    return layer


def _text(key: str, text: str, known: set[Any]) -> str | list[str] | None:
    if list in known and text.startswith("[") and text.endswith("]"):
        entries = (entry.strip() for entry in _ENTRY.findall(text[1:-1]))
        return [_unquoted(entry) for entry in entries if entry]
    if NoneType in known and text in ("", "null"):
        return None
    if not text:
        raise ConfigError(f"{key}= is empty: give a value")
    if text.startswith("!!") or Reader.NON_PRINTABLE.search(text):
        # A tag of YAML, which nobody means as a name, and what config.yaml could not hold.
        raise ConfigError(f"{key}={text!r} is not a text: it has a YAML tag or control characters")
    return _unquoted(text)


def _unquoted(text: str) -> str:
    quote = text[:1]
    pair = len(text) > 1 and quote in "'\"" and text.endswith(quote)
    return text[1:-1] if pair and quote not in text[1:-1] else text


def _scalars(node: yaml.Node | None, value: Any, key: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        for name, item in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value in value:
                below = f"{key}.{name.value}" if key else name.value
                yield from _scalars(item, value[name.value], below)
    elif isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        for item, entry in zip(node.value, value, strict=True):
            yield from _scalars(item, entry, key)  # an entry has the key of its list
    elif isinstance(node, yaml.ScalarNode) and node.style is None and not isinstance(value, str):
        yield key, node.value, value

"""Raw texts of samples: prompts from class names, and captions."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import ConfigError
from loaders.manifest import OversizedMember, ShardSet
from loaders.manifest_file import is_text

TEMPLATES = Path(__file__).resolve().parent.parent / "prompts" / "templates.json"


class BadText(Exception):
    """A caption that cannot be used; `reason` is one short word for the counts."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class TextOptions:
    """How a sample gets its texts.

    Args:
        templates: prompts with one `{}` each, for samples with a class.
        caption_source: `txt`, or `json.KEY` for a key of the sample's `.json`.
        views: texts per sample, drawn independently.

    Raises `ConfigError` for values that cannot be meant.
    """

    templates: Sequence[str]
    caption_source: str = "txt"
    views: int = 1

    def __post_init__(self) -> None:
        _check_templates("text templates", self.templates)
        key = self.caption_source.removeprefix("json.")
        if self.caption_source != "txt" and key in ("", self.caption_source):
            raise ConfigError(f"data.caption={self.caption_source!r}: give 'txt' or 'json.KEY'")
        if self.views < 1:
            raise ConfigError(f"text views must be at least 1, not {self.views}")


def presets() -> dict[str, dict]:
    """The content of prompts/templates.json: name -> its `templates` and where they are from."""
    return json.loads(TEMPLATES.read_text(encoding="utf-8"))


def load_templates(name_or_path: str) -> list[str]:
    """Prompt templates, each with one `{}` for the class name.

    `name_or_path`: a preset of prompts/templates.json (`clip_80`; `unicl_81`: these and the bare
    name; `simple`; `clipart`), or a JSON file with a list of strings. Raises `ConfigError`.
    """
    known = presets()
    if name_or_path in known:
        templates = known[name_or_path]["templates"]
    else:
        try:
            if not Path(name_or_path).is_file():  # a device or pipe would be read for ever
                raise FileNotFoundError("no such file")
            templates = json.loads(Path(name_or_path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"templates {name_or_path!r}: neither one of {', '.join(known)} nor a JSON file "
                f"with a list of strings ({error})"
            ) from None
    _check_templates(name_or_path, templates)
    return templates


def label_text(names: Sequence[str], templates: Sequence[str], rng: random.Random) -> str:
    """A prompt for a class: one of its names, then one template, both drawn uniformly.

    Commas are removed from the name and `+` becomes a space, as in the released code of UniCL
    (microsoft/UniCL, prompt engineering).
    """
    name = rng.choice(names).replace(",", "").replace("+", " ")
    return rng.choice(templates).replace("{}", name)


def caption_text(raw: str | dict | None, choice: str) -> str:
    """The caption in `raw`: itself for choice `txt`, its entry KEY for `json.KEY`.

    Surrounding white space is removed. Raises `BadText` with reason `no_caption` (absent),
    `caption_not_text` (also for halves of surrogate pairs, which no tokenizer takes) or
    `empty_caption`.
    """
    if isinstance(raw, dict):
        raw = raw.get(choice.removeprefix("json."))
    if raw is None:
        raise BadText("no_caption")
    if not is_text(raw):
        raise BadText("caption_not_text")
    if not raw.strip():
        raise BadText("empty_caption")
    return raw.strip()


def read_caption(shards: ShardSet, index: int, choice: str) -> str:
    """Caption of a sample.

    Raises `BadText` as `caption_text`, or `caption_not_utf8`, `bad_json`, `caption_too_large`.
    """
    try:
        raw = shards.read_text(index) if choice == "txt" else shards.read_json(index)
    except OversizedMember:
        raise BadText("caption_too_large") from None
    except UnicodeDecodeError:
        raise BadText("caption_not_utf8") from None
    except ValueError:
        raise BadText("bad_json") from None
    return caption_text(raw, choice)


def _check_templates(what: str, templates: Sequence[str]) -> None:
    good = isinstance(templates, list | tuple) and templates
    if not good or any(not is_text(t) or t.count("{}") != 1 for t in templates):
        raise ConfigError(f"{what}: templates are a non-empty list of strings with one {{}} each")

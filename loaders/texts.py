"""Raw texts of samples: prompts from class names, and captions, of which an image may have several.

Several captions are a list in `.json`; or the lines of a text, in sets whose manifest says so
(`caption_lines`), in those that CLIP_benchmark marks as retrieval, and where the sample's `.json`
lists the same lines as `captions`. Any other text is one caption, line breaks included.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loaders.caption_recipes import CaptionRecipe, check_caption_source
from loaders.errors import ConfigError
from loaders.manifest import OversizedMember, ShardSet
from loaders.manifest_file import is_text
from loaders.plain_text import plain

TEMPLATES = Path(__file__).resolve().parent.parent / "prompts" / "templates.json"


# Reasons of `BadText` that say that a source has no text, not that something is damaged.
ABSENT = frozenset({"no_caption", "caption_not_text", "empty_caption"})


class BadText(Exception):
    """A caption that cannot be used; `reason` is one short word for the counts.

    `where`: key of the configuration and source, if a text view has a recipe of its own.
    """

    def __init__(self, reason: str, where: tuple[str, str] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.where = reason, where


@dataclass(frozen=True)
class TextOptions:
    """How a sample gets its texts.

    Args:
        templates: prompts with one `{}` each, for samples with a class.
        caption_source: `txt`, or `json.KEY` for a key of the sample's `.json`.
        views: texts per sample: prompts drawn independently, captions without repeating one as
            long as there are others.
        recipes: of the captions, one for each view, each drawn by itself; the source is then the
            first one's. Empty: all views are of `caption_source`.

    Raises `ConfigError` for values that cannot be meant.
    """

    templates: Sequence[str]
    caption_source: str = "txt"
    views: int = 1
    recipes: tuple[CaptionRecipe, ...] = ()

    def __post_init__(self) -> None:
        _check_templates("text templates", self.templates)
        check_caption_source(self.caption_source)
        if self.views < 1:
            raise ConfigError(f"text views must be at least 1, not {self.views}")
        if self.recipes and len(self.recipes) != self.views:
            raise ConfigError(f"{len(self.recipes)} caption recipes for {self.views} text views")


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
            templates = json.loads(Path(name_or_path).read_bytes())
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

    Surrounding white space and a byte order mark are removed. Raises `BadText` with reason
    `no_caption` (absent), `caption_not_text` (also for halves of surrogate pairs, which no
    tokenizer takes) or `empty_caption`.
    """
    return _clean(raw.get(choice.removeprefix("json.")) if isinstance(raw, dict) else raw)


def _clean(raw: object) -> str:
    """One caption, as `caption_text` describes it."""
    if raw is None:
        raise BadText("no_caption")
    if not is_text(raw):
        raise BadText("caption_not_text")
    text = plain(raw).strip()
    if not text:
        raise BadText("empty_caption")
    return text


def read_caption(shards: ShardSet, index: int, choice: str) -> str:
    """Text of a sample as one string, also where its lines are several captions.

    Raises `BadText` as `caption_text`, or `caption_not_utf8`, `bad_json`, `caption_too_large`.
    """
    return _clean(_raw_caption(shards, index, choice))


def read_captions(shards: ShardSet, index: int, choice: str) -> list[str]:
    """Captions of a sample that can be used, in their order, at least one; see above.

    Raises `BadText` as `read_caption`, of several that cannot be used with the first one's reason.
    """
    raw = _raw_caption(shards, index, choice)
    several = raw if isinstance(raw, list) else [raw]
    if is_text(raw) and len(lines := raw.splitlines()) > 1:
        marked = shards.shard_of(index) in shards.caption_lines
        if marked or (choice == "txt" and _lists_lines(shards, index, lines)):
            several = lines
    found, errors = [], []
    for one in several:
        try:
            found.append(_clean(one))
        except BadText as error:
            errors.append(error)
    if not found:
        raise errors[0] if errors else BadText("no_caption")
    return found


def draw_captions(captions: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` captions drawn uniformly, none again before all were drawn."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(captions, min(len(captions), count - len(drawn)))
    return drawn


def count_captions(shards: ShardSet, choice: str, samples: int) -> list[int]:
    """Number of captions of each of the first `samples` that has any."""
    counts = []
    for index in range(min(samples, len(shards))):
        try:
            counts.append(len(read_captions(shards, index, choice)))
        except BadText:
            continue
    return counts


def _lists_lines(shards: ShardSet, index: int, lines: Sequence[str]) -> bool:
    """Whether the sample's `.json` states these lines as its list `captions`.

    Sets of data_prep/coco.py and flickr30k.py are known by it where no manifest says more.
    """
    try:
        captions = (shards.read_json(index) or {}).get("captions")
    except (ValueError, OversizedMember):
        return False
    if not isinstance(captions, list) or not all(map(is_text, captions)):
        return False
    return [text.strip() for text in captions] == [text.strip() for text in lines if text.strip()]


def _raw_caption(shards: ShardSet, index: int, choice: str) -> object:
    """The `.txt`, or the value of a key of the `.json`; None if absent. Raises `BadText`."""
    try:
        if choice == "txt":
            return shards.read_text(index)
        return (shards.read_json(index) or {}).get(choice.removeprefix("json."))
    except OversizedMember:
        raise BadText("caption_too_large") from None
    except UnicodeDecodeError:
        raise BadText("caption_not_utf8") from None
    except ValueError:
        raise BadText("bad_json") from None


def _check_templates(what: str, templates: Sequence[str]) -> None:
    good = isinstance(templates, list | tuple) and templates
    if not good or any(not is_text(t) or t.count("{}") != 1 for t in templates):
        raise ConfigError(f"{what}: templates are a non-empty list of strings with one {{}} each")

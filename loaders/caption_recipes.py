"""What `data.caption` says: where the text of each text view of an image-text pair comes from.

    data.caption: txt                                     # or json.KEY: one source, all text views
    data.caption:                                         # or each text view of the method by name
      caption: {from: [txt, json.rewrites], min_words: 2}
      summary: {from: [json.summary]}
      eda: {from: [txt], augment: eda}

`loaders.captions` reads and draws by it. No torch here: a configuration is checked by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loaders.choices import TEXT_AUGMENTATIONS, by_view
from loaders.errors import ConfigError

KEY = "data.caption"
_KEYS = ("from", "augment", "min_words")


@dataclass(frozen=True)
class CaptionRecipe:
    """How one text view gets its caption.

    Args:
        view: name of the text view.
        sources: each `txt` or `json.KEY`; what all of them hold is drawn from uniformly, and the
            first one stands in for what is too short.
        augment: what is done to the drawn text, of TEXT_AUGMENTATIONS; None: nothing.
        min_words: an entry of another source than the first with fewer words is too short.
    """

    view: str
    sources: tuple[str, ...]
    augment: str | None = None
    min_words: int = 0

    @property
    def key(self) -> str:
        """The key of its sources, for messages."""
        return f"{KEY}.{self.view}.from"

    def __str__(self) -> str:
        augmented = f", {self.augment}" if self.augment else ""
        return f"{self.view} of {' or '.join(self.sources)}{augmented}"


def check_caption_source(choice: Any, key: str = KEY) -> None:
    """Raise `ConfigError`, which names `key`, unless `choice` is `txt` or `json.KEY`."""
    name = choice.removeprefix("json.") if isinstance(choice, str) else ""
    if choice != "txt" and name in ("", choice):
        raise ConfigError(f"{key}={choice!r}: give 'txt' or 'json.KEY'")


def read(value: Any, views: Sequence[str]) -> tuple[str, tuple[CaptionRecipe, ...]]:
    """(source for all text views, recipes): the recipes are empty unless `value` is a mapping.

    Args:
        value: of `data.caption`. views: names of the method's text views.

    Raises:
        ConfigError: no source, another view than these, or an option that is unknown or wrong.
    """
    if not isinstance(value, dict):
        check_caption_source(value)
        return value, ()
    entries = by_view(KEY, value, views)
    recipes = tuple(_recipe(view, entry) for view, entry in zip(views, entries, strict=True))
    return recipes[0].sources[0], recipes


def _recipe(view: str, entry: Any) -> CaptionRecipe:
    key = f"{KEY}.{view}"
    if not isinstance(entry, dict) or "from" not in entry or set(entry) - set(_KEYS):
        raise ConfigError(
            f"{key}={entry!r}: a text view is {{from: [SOURCE, …]}} with sources 'txt' or "
            f"'json.KEY', and perhaps {' and '.join(_KEYS[1:])}"
        )
    sources, augment = entry["from"], entry.get("augment")
    sources = sources if isinstance(sources, list) else [sources]
    for source in sources:
        check_caption_source(source, f"{key}.from")
    if not sources or len(set(sources)) < len(sources):
        raise ConfigError(f"{key}.from={sources}: give at least one source, and none twice")
    if augment is not None and augment not in TEXT_AUGMENTATIONS:
        raise ConfigError(f"{key}.augment={augment!r}; one of {', '.join(TEXT_AUGMENTATIONS)}")
    words = entry.get("min_words", 0)
    if type(words) is not int or words < 0:
        raise ConfigError(f"{key}.min_words={words!r} must be a whole number of at least 0")
    return CaptionRecipe(view, tuple(sources), augment, words)

"""Captions of one image-text pair, drawn for each text view of a method.

One source for all views: no caption twice before all were drawn (`loaders.texts`). A recipe for
each view (`loaders.caption_recipes`): every view is drawn by itself. The entries of all sources of
a recipe, lists flattened, are one list, from which one entry is drawn uniformly; where it is not of
the first source and has too few words, one of the first source's stands in, as in LaCLIP (of M
rewrites and the caption itself: probability (1 + too short ones) / (M + 1) for the caption).

A sample is bad where the first source of a recipe has no text, or where the file of any source is
damaged. Another source that a sample lacks, and entries that are no text, are left out. So a view
whose texts come from an annotation alone (`from: [json.summary]`) takes the samples that have it.
"""

import random
from collections.abc import Callable, Sequence

from loaders.bad_samples import what_it_holds
from loaders.caption_recipes import CaptionRecipe
from loaders.eda import eda
from loaders.errors import DataError
from loaders.manifest import ShardSet
from loaders.texts import ABSENT, BadText, TextOptions, draw_captions, read_captions

AUGMENT: dict[str, Callable[[str, random.Random], str]] = {"eda": eda}
TRIED = 100  # samples in which a source is looked for before a run; the first that has it ends it


def draw(
    shards: ShardSet, index: int, options: TextOptions, rng: random.Random
) -> tuple[list[str], str]:
    """The texts of a pair, one for each view, and what was drawn first, before it was augmented.

    Raises `BadText` as `loaders.texts.read_captions`, of the source that a view cannot do without.
    """
    if not options.recipes:
        captions = read_captions(shards, index, options.caption_source)
        drawn = draw_captions(captions, options.views, rng)
        return drawn, drawn[0]
    read: dict[str, list[str]] = {}  # several views may share a source
    drawn = [_entry(shards, index, recipe, read, rng) for recipe in options.recipes]
    texts = [
        AUGMENT[recipe.augment](text, rng) if recipe.augment else text
        for recipe, text in zip(options.recipes, drawn, strict=True)
    ]
    return texts, drawn[0]


def _entry(
    shards: ShardSet,
    index: int,
    recipe: CaptionRecipe,
    read: dict[str, list[str]],
    rng: random.Random,
) -> str:
    for number, source in enumerate(recipe.sources):
        try:
            if not read.get(source):  # empty: raises again, if it is needed here
                read[source] = read_captions(shards, index, source)
        except BadText as error:
            if number == 0 or error.reason not in ABSENT:
                raise BadText(error.reason, (recipe.key, source)) from None
            read[source] = []
    first = read[recipe.sources[0]]
    entries = [text for source in recipe.sources for text in read[source]]
    place = rng.randrange(len(entries))
    if place >= len(first) and len(entries[place].split()) < recipe.min_words:
        return rng.choice(first)
    return entries[place]


def check_sources(shards: ShardSet, recipes: Sequence[CaptionRecipe]) -> None:
    """Look for every source of every recipe in some samples of a set, spread over all of it.

    Raises:
        DataError: none of them has it; names key, source and remedy.
    """
    step = max(1, len(shards) // TRIED)
    tried = range(0, len(shards), step)[:TRIED]
    for recipe in recipes:
        for source in recipe.sources:
            if any(_has(shards, index, source) for index in tried):
                continue
            holding, ways, _ = what_it_holds(shards, 0)
            remedy = "join a table with data_prep.annotate" if source != "txt" else "leave it out"
            if ways:
                remedy += f", or name what is there: {', '.join(ways[:3])}"
            raise DataError(
                f"{recipe.key}: {source}: none of the {len(tried)} samples tried of {shards.name} "
                f"has it ({holding}); {remedy}"
            )


def _has(shards: ShardSet, index: int, source: str) -> bool:
    try:
        return bool(read_captions(shards, index, source))
    except BadText:
        return False

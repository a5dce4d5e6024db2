"""The plan of a run in words: what it says of views, captions and shares."""

from omegaconf import DictConfig, OmegaConf

from loaders import caption_recipes, texts
from loaders.manifest import ShardSet
from loaders.one_source import OneSourceOrder
from loaders.order import Order

_LOOKED_AT = 8  # samples of a source, to say how many captions an image has


def shares(order: Order, steps: int) -> str:
    """What a global batch, or the run, has of each stream."""
    names = [stream.name for stream in order.streams]
    if isinstance(order, OneSourceOrder):
        done = zip(names, order.steps_of(steps), strict=True)
        said = ", ".join(f"{count} of {name}" for name, count in done)
        return f"each global batch of one source; of {steps} steps {said}"
    pairs = zip(order.shares, names, strict=True)
    return ", ".join(f"{share} {name}" for share, name in pairs) + " in every global batch"


def named_views(data: DictConfig) -> list[str]:
    """Lines on the views that have recipes of their own."""
    lines = []
    if OmegaConf.is_dict(data.augmentation):
        said = ", ".join(f"{name} {recipe}" for name, recipe in data.augmentation.items())
        lines.append(f"  image views: {said}")
    if OmegaConf.is_dict(data.caption):
        _, recipes = caption_recipes.read(OmegaConf.to_container(data.caption), list(data.caption))
        lines.append(f"  texts of pairs: {'; '.join(map(str, recipes))}")
    return lines


def captions(source: ShardSet, data: DictConfig, drawn: int) -> str:
    """How many captions an image has, by the first samples; empty where each has one.

    Args:
        source: a data set. data: the section `data`. drawn: number of text views.
    """
    if source.kind != "image_text" or OmegaConf.is_dict(data.caption):
        return ""
    counts = texts.count_captions(source, data.caption, _LOOKED_AT)
    low, high = min(counts, default=0), max(counts, default=0)
    if high < 2:
        return ""
    number = f"{low}" if low == high else f"{low} to {high}"
    return (
        f", {number} captions an image (first {len(counts)} samples), "
        f"{'one' if drawn == 1 else drawn} drawn each time"
    )

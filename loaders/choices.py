"""The words that keys of `data:` may have; who acts on a word imports it from here.

In a file of their own so that a configuration is checked without torch.
"""

from collections.abc import Sequence
from typing import Any

from loaders.errors import ConfigError

SAMPLERS = ("balanced", "proportional", "ratio", "one_source")  # loaders.order.plan_streams
MERGES = ("disjoint", "synset")  # loaders.labels.LabelSpace
CAPTION_LABELS = ("unique", "by_text")  # loaders.batch.TripletDataset
AUGMENTATIONS = (  # loaders.views.build_train
    *("unicl_release", "paper", "clip", "clipart", "none"),
    # loaders.recipes.RECIPES
    *("slip_weak", "slip_strong", "simclr", "moco_v3_first", "moco_v3_second", "declip", "uniclip"),
    *("supcon", "supcon_weak", "align", "alip", "otter", "autoaugment"),
    *("clipart_strong", "clipart_uniclip"),
)
REPORTING = ("uniclip", "clipart_uniclip")  # of these, those that report what they did
# The images of `unicl_release`, blended in pairs with their targets (losses/_mixing.py).
MIXED = "mixup_cutmix"
TEXT_AUGMENTATIONS = ("eda",)  # loaders.captions


def by_view(key: str, value: Any, views: Sequence[str]) -> list[Any]:
    """The recipe of each of a method's views, in their order.

    Args:
        key: `data.augmentation` or `data.caption`, for messages.
        value: one recipe for all views, or a mapping from the name of each view to its recipe.
        views: names of the method's image or text views.

    Raises:
        ConfigError: a mapping that does not name exactly these views.
    """
    if not isinstance(value, dict):
        return [value] * len(views)
    unknown = [str(name) for name in value if name not in views]
    missing = [name for name in views if name not in value]
    if unknown or missing:
        wrong = [f"there is no view {', '.join(unknown)}"] if unknown else []
        wrong += [f"{', '.join(missing)} has no recipe"] if missing else []
        raise ConfigError(
            f"{key}: {' and '.join(wrong)}; this method's views are {', '.join(views)}: give each "
            f"one its recipe as {key}.NAME, or one for all as {key}=RECIPE"
        )
    return [value[name] for name in views]


def check_augmentation(
    value: Any, views: Sequence[str], mixes: bool, needs_parameters: bool = False
) -> None:
    """Raise `ConfigError` unless `data.augmentation` has a known recipe for each image view.

    `mixes`: whether the method can blend its targets, as `MIXED` asks for. `needs_parameters`:
    whether the model is told what each view did.
    """
    if value == MIXED:
        if not mixes:
            raise ConfigError(
                f"data.augmentation={MIXED}: this method cannot blend its targets, and without "
                "that it would be another experiment; data.augmentation=unicl_release trains "
                "without, and the methods unicl, clip and cross_entropy can"
            )
        return
    for name, recipe in zip(views, by_view("data.augmentation", value, views), strict=True):
        key = f"data.augmentation.{name}" if isinstance(value, dict) else "data.augmentation"
        if recipe not in AUGMENTATIONS:
            raise ConfigError(f"{key}={recipe!r}; one of {', '.join(AUGMENTATIONS)}, {MIXED}")
        if needs_parameters and recipe not in REPORTING:
            raise ConfigError(
                f"{key}={recipe}: this method tells the model what was done to each view, and "
                f"this recipe does not report it; use one that does: {', '.join(REPORTING)}"
            )

"""Emoji in three drawing styles (Noto, Fluent 3D, Twemoji) with a coarse class each."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from data_prep.clipart.classes import class_ids, emoji_class
from data_prep.clipart.packages import FLUENT_3D, NOTO_EMOJI, TWEMOJI, Package, read_members
from data_prep.clipart.write import Sample, render
from loaders.errors import DataError
from loaders.progress import Progress

EMOJI_TEST = "usr/share/unicode/emoji/emoji-test.txt"
NOTO_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NOTO_FONT_SIZE = 109  # the one size of the bitmaps in the font
NOTO_CANVAS = (136, 128)  # size of those bitmaps
SKIN_TONES = frozenset(range(0x1F3FB, 0x1F3FF + 1))
VARIATION_SELECTOR = 0xFE0F
FLAGS_OF_PLACES = ("country-flag", "subdivision-flag")
_LINE = re.compile(r"^([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[0-9.]+ (.+)$")


@dataclass(frozen=True)
class Emoji:
    """A base emoji of emoji-test.txt."""

    code_points: tuple[int, ...]
    subgroup: str
    name: str

    @property
    def text(self) -> str:
        return "".join(map(chr, self.code_points))

    @property
    def key(self) -> str:
        """Lower-case hexadecimal code points without the variation selector, joined by "-"."""
        return "-".join(f"{c:04x}" for c in self.code_points if c != VARIATION_SELECTOR)


def parse_emoji_test(text: str) -> list[Emoji]:
    """The fully qualified emoji of a Unicode emoji-test.txt, less those with a skin tone."""
    subgroup, emoji = "", []
    for line in text.splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif match := _LINE.match(line):
            code_points = tuple(int(code, 16) for code in match[1].split())
            if not SKIN_TONES.intersection(code_points):
                emoji.append(Emoji(code_points, subgroup, match[2].strip()))
    return emoji


def read_emoji(unicode_data: Path) -> list[tuple[Emoji, int]]:
    """(emoji, class id) of those emoji in the package `unicode-data` that have a class."""
    (text,) = (data for _, data in read_members(unicode_data, lambda name: name == EMOJI_TEST))
    ids = class_ids()
    named = [(e, emoji_class(e.subgroup, e.name)) for e in parse_emoji_test(text.decode())]
    return [(emoji, ids[name]) for emoji, name in named if name is not None]


def noto_samples(package: Path, emoji: list[tuple[Emoji, int]]) -> Iterator[Sample]:
    """Noto's drawings, from the colour bitmaps of its font."""
    if not features.check("raqm"):
        # Without Raqm, joined emoji and flags would come out as their parts, silently.
        raise DataError(
            "Pillow was built without Raqm text layout: install the Pillow wheel that "
            "requirements.txt pins"
        )
    (data,) = (data for _, data in read_members(package, lambda name: name == NOTO_FONT))
    font = ImageFont.truetype(io.BytesIO(data), NOTO_FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    for entry, label in Progress(emoji, desc="Noto", unit="image"):
        canvas = Image.new("RGBA", NOTO_CANVAS, (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((0, 0), entry.text, font=font, embedded_color=True)
        yield from _sample(canvas, entry, label, NOTO_EMOJI, f"{Path(NOTO_FONT).name}#{entry.key}")


def fluent_samples(package: Path, emoji: list[tuple[Emoji, int]]) -> Iterator[Sample]:
    """Fluent 3D drawings, less the flags of places: those are not Microsoft's art but Noto's."""
    wanted = [pair for pair in emoji if pair[0].subgroup not in FLAGS_OF_PLACES]
    return _file_samples(package, FLUENT_3D, "package/assets/", ".webp", wanted, "Fluent 3D")


def twemoji_samples(package: Path, emoji: list[tuple[Emoji, int]]) -> Iterator[Sample]:
    """Twemoji's drawings."""
    return _file_samples(package, TWEMOJI, "package/img/twitter/64/", ".png", emoji, "Twemoji")


def _file_samples(
    path: Path,
    package: Package,
    folder: str,
    suffix: str,
    emoji: list[tuple[Emoji, int]],
    style: str,
) -> Iterator[Sample]:
    by_key = {entry.key: (entry, label) for entry, label in emoji}

    def key(name: str) -> str:
        codes = name.removeprefix(folder).removesuffix(suffix).split("-")
        return "-".join(code for code in codes if code != f"{VARIATION_SELECTOR:x}")

    def wanted(name: str) -> bool:
        return name.startswith(folder) and name.endswith(suffix) and key(name) in by_key

    bar = Progress(desc=style, unit="image", total=len(by_key))
    with bar:
        for name, data in sorted(read_members(path, wanted)):
            bar.update()
            with Image.open(io.BytesIO(data)) as image:
                yield from _sample(image, *by_key[key(name)], package, name)


def _sample(
    image: Image.Image, entry: Emoji, label: int, package: Package, origin: str
) -> Iterator[Sample]:
    jpeg = render(image)
    if jpeg is not None:
        yield Sample(jpeg, None, label, package.label, origin, entry.name)

"""Pictures of the npm packages `@iconify-json/NAME`: one JSON file of SVG fragments, by name."""

import base64
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_prep.clipart.claims_packages import Source, check_licence
from data_prep.clipart.concepts import Called, Concepts
from data_prep.clipart.emoji import Emoji
from data_prep.clipart.packages import read_members
from data_prep.clipart.write import Sample, render
from loaders.errors import DataError
from loaders.progress import Progress

SCRIPT = Path(__file__).with_name("rasterise.mjs")
RESVG_FILES = ("package/index.mjs", "package/index_bg.wasm")
SIDE = 128  # pixels; twice the final side, so that cropping leaves enough
MEMBER = "package/icons.json"


def read_icons(archive: Path) -> dict[str, str]:
    """Name → SVG document of every picture of an Iconify package, other names of it left out."""
    (data,) = (data for _, data in read_members(archive, MEMBER.__eq__))
    content = json.loads(data)
    return {name: _document(icon, content) for name, icon in sorted(content["icons"].items())}


def _document(icon: Mapping, defaults: Mapping) -> str:
    left, top, width, height = (
        icon.get(key, defaults.get(key, other))
        for key, other in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    # `currentColor` in the fragment is the colour of the text around: black.
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'color="black" width="{width}" height="{height}" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def rasterise(documents: Sequence[str], resvg: Path) -> Iterator[Image.Image | None]:
    """RGBA pictures of SVG documents, `SIDE` pixels wide; None for one that cannot be drawn.

    `resvg`: the package `@resvg/resvg-wasm`. Raises `DataError` when Node.js is absent or fails.
    """
    with tempfile.TemporaryDirectory(prefix="resvg-") as folder:
        for name, data in read_members(resvg, RESVG_FILES.__contains__):
            Path(folder, Path(name).name).write_bytes(data)
        try:
            done = subprocess.run(
                ["node", str(SCRIPT), folder, str(SIDE)],
                input="".join(json.dumps(document) + "\n" for document in documents).encode(),
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            raise DataError("drawing SVG needs `node` (Node.js 18 or later); install it") from None
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(documents):
        reason = (done.stderr.decode().strip() or "no output").splitlines()[-1]
        raise DataError(f"`node {SCRIPT.name}` failed: {reason}")
    for line in lines:
        yield Image.open(io.BytesIO(base64.b64decode(line))) if line else None


def emoji_samples(
    source: Source, archive: Path, emoji: Sequence[tuple[Emoji, int]], resvg: Path
) -> list[Sample]:
    """The drawings of an emoji style; a picture is an emoji when it is named as Unicode names it.

    Spaces and marks do not count, and older names of animals end in "face".
    """
    check_licence(source, archive)
    icons = read_icons(archive)
    by_letters = {_letters(name): name for name in reversed(icons)}
    chosen = []
    for entry, label in emoji:
        wanted = (_letters(entry.name), _letters(entry.name) + "face")
        name = next((by_letters[key] for key in wanted if key in by_letters), None)
        if name is not None:
            chosen.append((name, label, entry.name))
    return _samples(source, icons, chosen, resvg)


def icon_samples(
    source: Source,
    archive: Path,
    concepts: Concepts,
    classes: Mapping[str, int],
    resvg: Path,
) -> list[Sample]:
    """The icons whose whole name is a noun of a class (concept → class id): "acoustic-guitar".

    Names such as "home-account" put the thing first and its use last, so that the last word says
    nothing by itself.
    """
    check_licence(source, archive)
    icons = read_icons(archive)
    chosen = []
    for name in icons:
        phrase = name.replace("-", " ")
        if not concepts.wordnet.senses(phrase):
            continue
        looked = concepts.look_up(Called(phrase, ()))
        found = concepts.assign(looked, set(classes))
        # Nothing beside an icon says in which sense its name is meant: "chat" is no bird, but an
        # icon called "heart" is a heart.
        if found is not None and (concepts.frequent(phrase) or found in looked[0]):
            chosen.append((name, classes[found], phrase))
    return _samples(source, icons, chosen, resvg)


def _samples(
    source: Source,
    icons: Mapping[str, str],
    chosen: Sequence[tuple[str, int, str]],
    resvg: Path,
) -> list[Sample]:
    """Each drawing once, equal ones of one class only under the first name."""
    samples, seen = [], set()
    pictures = rasterise([icons[name] for name, *_ in chosen], resvg)
    pairs = zip(chosen, pictures, strict=True)
    bar = Progress(pairs, desc=source.package.name, unit="image", total=len(chosen))
    for (name, label, title), picture in bar:
        jpeg = None if picture is None else render(picture)
        if jpeg is None or jpeg in seen:
            continue
        seen.add(jpeg)
        origin = f"{MEMBER}#{name}"
        samples.append(Sample(jpeg, None, label, source.package.label, origin, title))
    return samples


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("flag-for-", "flag"))

"""From pictures to shards: 64-pixel JPEG, deterministic tars, provenance table, manifest."""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from loaders.manifest import write_manifest

SIZE = 64
JPEG_QUALITY = 85
SAMPLES_PER_SHARD = 1000
DATE = "2026-11-21"  # of the first build; fixed, so that a rebuild gives equal bytes
OPAQUE = 16  # of 255: alpha below it counts as transparent
MIN_INK = 4.0  # of 255: fainter drawings are blank to the eye at this size


@dataclass(frozen=True)
class Sample:
    """One picture with its caption and/or class, and where it came from."""

    image: bytes
    text: str | None
    label: int | None
    package: str
    origin: str  # file in the package (fonts: file and code points)
    title: str


def render(image: Image.Image) -> bytes | None:
    """A 64 x 64 RGB JPEG of the drawing: on white, cropped to its content, centred, aspect kept.

    Returns None when next to nothing is visible on white.
    """
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    # Many drawings sit on an empty page; without the crop they would be specks at 64 pixels.
    # Only transparency is cropped: white may belong to the drawing, as in a flag.
    box = alpha.point(lambda value: 255 if value >= OPAQUE else 0).getbbox()
    if box is None:
        return None
    content = Image.new("RGB", rgba.size, "white")
    content.paste(rgba, mask=alpha)
    content = content.crop(box)
    scale = SIZE / max(content.size)
    width, height = (max(1, round(side * scale)) for side in content.size)
    content = content.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(content, ((SIZE - width) // 2, (SIZE - height) // 2))
    if ink(square) < MIN_INK:
        return None
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def ink(image: Image.Image) -> float:
    """Mean distance from white (0 to 255) over the pixels, each by its farthest channel."""
    red, green, blue = ImageChops.invert(image).split()
    return ImageStat.Stat(ImageChops.lighter(ImageChops.lighter(red, green), blue)).mean[0]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A plain tar whose bytes depend on names, contents and order only."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)  # time, user and group stay 0
            info.size = len(data)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(data))


def write_set(
    folder: Path,
    kind: str,
    samples: Sequence[Sample],
    classes: Sequence[dict],
    source: str,
    license: str,
    attempted: int,
) -> dict:
    """Write `samples` in a fixed shuffled order to `folder`; returns the manifest."""
    name = folder.name
    shards = folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    for old in shards.glob("*.tar"):
        old.unlink()
    ordered = sorted(samples, key=lambda s: _order_key(f"{name}/{s.package}/{s.origin}"))
    for start in range(0, len(ordered), SAMPLES_PER_SHARD):
        members = []
        for index, sample in enumerate(ordered[start : start + SAMPLES_PER_SHARD], start):
            members.append((f"{index:09d}.jpg", sample.image))
            if sample.text is not None:
                members.append((f"{index:09d}.txt", sample.text.encode()))
            if sample.label is not None:
                members.append((f"{index:09d}.cls", str(sample.label).encode()))
        write_tar(shards / f"{start // SAMPLES_PER_SHARD:05d}.tar", members)
    provenance = _provenance(ordered)
    (folder / "provenance.tsv").write_bytes(provenance)
    return write_manifest(
        folder,
        name=name,
        kind=kind,
        classes=classes,
        source=source,
        license=license,
        date=DATE,
        attempted=attempted,
        extra={"provenance_sha256": hashlib.sha256(provenance).hexdigest()},
    )


def _provenance(samples: Sequence[Sample]) -> bytes:
    rows = ["key\tpackage\tfile\ttitle"]
    for index, sample in enumerate(samples):
        rows.append(f"{index:09d}\t{sample.package}\t{sample.origin}\t{sample.title}")
    return ("\n".join(rows) + "\n").encode()


def _order_key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

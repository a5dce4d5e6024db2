"""The pinned packages of the claims study, with their licences.

What quickstart.py reads is pinned in packages.py; here is what only claims.py reads. Nothing of it
is shipped: it is fetched into the user's folder, so that share-alike licences, too, may be read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from data_prep.clipart import packages
from data_prep.clipart.packages import Package, read_members
from loaders.errors import DataError


@dataclass(frozen=True)
class Source:
    """A package, its licence (SPDX), whose work it is."""

    package: Package
    licence: str
    author: str


def _iconify(name: str, version: str, sha256: str, licence: str, author: str) -> Source:
    file = f"iconify-json-{name}-{version}.tgz"
    return Source(Package(f"@iconify-json/{name}", version, "npm", file, sha256), licence, author)


WORDNET = Source(
    Package(
        "wordnet-base",
        "1:3.0-37",
        "apt",
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ),
    "WordNet-3.0",
    "Princeton University",
)
FASHION_MNIST = Source(
    Package(
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "apt",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    "MIT",
    "Zalando SE",
)
# Draws SVG to pixels, in WebAssembly: the same pixels on every machine that has Node.js.
RESVG = Source(
    Package(
        "@resvg/resvg-wasm",
        "2.6.2",
        "npm",
        "resvg-resvg-wasm-2.6.2.tgz",
        "ff51acbb5ee0074601b75c3bea9226a18d346752af787f6d2d3adcdd98493d71",
    ),
    "MPL-2.0",
    "yisibl",
)
NOTO_V1 = _iconify(
    "noto-v1",
    "1.2.5",
    "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    "Apache-2.0",
    "Google Inc",
)
FIREFOX = _iconify(
    "fxemoji",
    "1.2.2",
    "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    "Apache-2.0",
    "Mozilla",
)
EMOJIONE = _iconify(
    "emojione",
    "1.2.3",
    "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    "CC-BY-4.0",
    "Emoji One",
)
OPENMOJI = _iconify(
    "openmoji",
    "1.2.29",
    "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    "CC-BY-SA-4.0",
    "OpenMoji",
)
FLUENT_CONTRAST = _iconify(
    "fluent-emoji-high-contrast",
    "1.2.6",
    "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    "MIT",
    "Microsoft Corporation",
)
STREAMLINE = _iconify(
    "streamline-emojis",
    "1.2.4",
    "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    "CC-BY-4.0",
    "Streamline",
)
GAME_ICONS = _iconify(
    "game-icons",
    "1.2.4",
    "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
    "CC-BY-3.0",
    "GameIcons",
)
MATERIAL = _iconify(
    "mdi",
    "1.2.3",
    "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac",
    "Apache-2.0",
    "Pictogrammers",
)
TABLER = _iconify(
    "tabler",
    "1.2.41",
    "3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6",
    "MIT",
    "Paweł Kuna",
)
ICON_PARK = _iconify(
    "icon-park",
    "1.2.4",
    "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f",
    "Apache-2.0",
    "ByteDance",
)
SHARED = (
    Source(packages.UNICODE_DATA, "Unicode-3.0", "Unicode, Inc."),
    Source(packages.NOTO_EMOJI, "Apache-2.0", "Google Inc"),
    Source(packages.FLUENT_3D, "MIT", "Microsoft Corporation"),
    Source(packages.TWEMOJI, "CC-BY-4.0", "Twitter, Inc and other contributors"),
    Source(packages.OPENCLIPART_SVG, "public domain", "the Open Clip Art Library's artists"),
    Source(packages.OPENCLIPART_PNG, "public domain", "the Open Clip Art Library's artists"),
    Source(packages.TUXPAINT_STAMPS, "GPL-2.0", "the Tux Paint developers"),
)
ALL = (
    *SHARED, WORDNET, FASHION_MNIST, RESVG, NOTO_V1, FIREFOX, EMOJIONE, OPENMOJI, FLUENT_CONTRAST,
    STREAMLINE, GAME_ICONS, MATERIAL, TABLER, ICON_PARK,
)  # fmt: skip


def check_licence(source: Source, archive: Path) -> None:
    """`DataError` when an Iconify package states another licence than the one named here."""
    (info,) = (data for _, data in read_members(archive, "package/info.json".__eq__))
    found = json.loads(info)["license"].get("spdx")
    if found != source.licence:
        raise DataError(f"{source.package.label}: its info.json says {found}, not {source.licence}")


def attribution() -> str:
    """Markdown: every package with its authors and licence."""
    rows = [
        f"| `{source.package.name}` | {source.package.version} | {source.package.manager} "
        f"| {source.author} | {source.licence} |"
        for source in ALL
    ]
    head = [
        "# Whose work the sets of the claims study are",
        "",
        "Every picture was cropped, centred and scaled to 64 pixels. `provenance.tsv` beside each",
        "set names package and file of each picture. OpenMoji is under CC BY-SA 4.0 and the Tux",
        "Paint stamps are under GPL-2: evaluate on them, and share them only under these licences.",
        "",
        "| package | version | from | authors | licence |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"

"""How images are fetched and stored: the options of gcc.py, yfcc.py and retry_failed.py."""

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """How images are fetched and stored. Sizes in pixels and bytes, times in seconds unless named.

    `timeout` is for one socket operation, `image_seconds` for a whole image with its redirects.
    `local_root`: the folder below which file: addresses are allowed.
    """

    image_size: int = 256
    encode_quality: int = 95
    min_image_size: int = 0
    max_aspect_ratio: float = math.inf
    processes: int = len(os.sched_getaffinity(0))
    threads: int = 32
    timeout: float = 10
    retries: int = 2
    image_seconds: float = 60
    max_image_bytes: int = 64 << 20
    max_image_pixels: int = 50_000_000
    stall_minutes: float = 10
    max_restarts: int = 3
    user_agent_token: str = "img2dataset"
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    allow_private_addresses: bool = False
    local_root: Path | None = None

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        for name in (
            "image_size",
            "processes",
            "threads",
            "timeout",
            "image_seconds",
            "max_image_bytes",
            "max_image_pixels",
            "stall_minutes",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
        if self.min_image_size < 0:
            raise ConfigError("--min-image-size must not be negative")
        if not self.max_aspect_ratio >= 1:
            raise ConfigError("--max-aspect-ratio is the longer side by the shorter: at least 1")
        if not 0 <= self.encode_quality <= 100:
            raise ConfigError(f"--encode-quality {self.encode_quality}: a JPEG quality is 0 to 100")
        if self.retries < 0 or self.max_restarts < 0:
            raise ConfigError("--retries and --max-restarts must not be negative")
        if self.stall_minutes * 60 <= self.image_seconds * (1 + self.retries):
            raise ConfigError(
                f"--stall-minutes {self.stall_minutes:g} is not longer than one image may take: "
                f"{1 + self.retries} tries of --image-seconds {self.image_seconds:g}"
            )


_HELP = {
    "image_size": "shorter side of a stored image; smaller ones stay as they are",
    "encode_quality": "JPEG quality",
    "min_image_size": "images with a shorter side below this are left out",
    "max_aspect_ratio": "images whose longer side is more than this many times the shorter are "
    "left out",
    "processes": "worker processes, each with one shard at a time",
    "threads": "downloads at the same time in each process",
    "timeout": "seconds for one socket operation",
    "retries": "further tries of a failed download",
    "image_seconds": "seconds for a whole image",
    "max_image_bytes": "larger files are given up",
    "max_image_pixels": "larger images are refused before they are decoded",
    "stall_minutes": "minutes without any download after which img2dataset is restarted",
    "max_restarts": "restarts in a row without a finished shard before giving up",
    "user_agent_token": "name in the User-Agent header, and in X-Robots-Tag rules for us alone",
}
_LIMITS = ("min_image_size", "max_aspect_ratio")  # part of the plan where they are in force
_STORED = ("image_size", "encode_quality", *_LIMITS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for every field of `Options` but `local_root`."""
    for name in _STORED:
        _add(parser, name)
    parser.add_argument(
        "--disallowed-header-directives",
        nargs="*",
        default=list(Options.disallowed_header_directives),
        help="X-Robots-Tag values that keep an image out; none given: all are taken "
        "(default: %(default)s)",
    )
    add_network_arguments(parser)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that may differ between two runs over the same set."""
    for name in _HELP:
        if name not in _STORED:
            _add(parser, name)
    parser.add_argument(
        "--allow-private-addresses",
        action="store_true",
        help="also fetch from loopback, private and link-local addresses (a mirror of your own)",
    )


def _add(parser: argparse.ArgumentParser, name: str) -> None:
    default = getattr(Options, name)
    flag, kind = f"--{name.replace('_', '-')}", Options.__annotations__[name]
    parser.add_argument(
        flag, type=kind, default=default, help=f"{_HELP[name]} (default: {default})"
    )


def read(arguments: argparse.Namespace, **changes: Any) -> Options:
    """`Options` from parsed flags; `changes` win. Raises `ConfigError`."""
    given = {key: value for key, value in vars(arguments).items() if key in Options.__annotations__}
    given |= changes
    given["disallowed_header_directives"] = tuple(given["disallowed_header_directives"])
    return Options(**given)


def identity(options: Options, samples_per_shard: int) -> dict[str, Any]:
    """What must stay the same while a set is prepared, for `Preparation.identity`."""
    same: dict[str, Any] = {
        name: getattr(options, name)
        for name in _STORED
        if name not in _LIMITS or getattr(options, name) != getattr(Options, name)
    }
    same["disallowed_header_directives"] = list(options.disallowed_header_directives)
    same["samples_per_shard"] = samples_per_shard
    if options.local_root is not None:
        same["local_root"] = str(options.local_root)
    return same


def from_identity(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Options` that a set was begun with, from its `Preparation.identity`."""
    same = {name: stored.get(name, getattr(Options, name)) for name in _LIMITS}
    same |= {name: stored[name] for name in ("image_size", "encode_quality")}
    same["disallowed_header_directives"] = stored["disallowed_header_directives"]
    return same | {"local_root": Path(stored["local_root"]) if "local_root" in stored else None}

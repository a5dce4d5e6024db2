"""Which tars a person means by a folder, a brace range or a glob. Standard library only."""

import argparse
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from loaders.errors import DataError

_BRACE = re.compile(r"\{([^{}]*)\}")
# s3://, https://, file://, and the commands that webdataset calls pipes.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")


def local(text: str) -> str:
    """A path as a person gave it, with `~` at its start as the home folder.

    A shell spells `~` out at the start of a word only, so `--out=~/x` arrives as it was typed.
    Raises `DataError` for an address, which `Path` would take for a folder named `s3:`.
    """
    if _ADDRESS.match(text):
        raise DataError(
            f"{text}: nothing is read from the network or written to it; download first, and give "
            "the path of a file or folder"
        )
    return os.path.expanduser(text)


def as_path(text: str) -> Path:
    """`local` as the `type` of an argument of argparse, which says the name of the option."""
    try:
        return Path(local(text))
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def exists(part: str) -> bool:
    """Whether one part of a specification means anything that is there, be it incomplete."""
    names = itertools.chain([part], _expand_braces(part))
    return any(os.path.exists(name) or any(glob.iglob(name)) for name in names)


def expand(part: str, listed_tars: Callable[[Path], list[str] | None]) -> list[str]:
    """Tar paths that one part of a specification means; every one exists.

    `part`: a folder, a tar, a brace range or a glob; see `local`. `listed_tars(folder)` gives the
    tars that the folder's manifest lists, None without one. Raises `DataError` for a missing file,
    a glob without a match, a folder without a tar, and an address.
    """
    part = local(part)
    if os.path.isdir(part):
        listed = listed_tars(Path(part))
        if listed:
            return _require(part, listed, "the manifest lists them: restore the files")
        found = glob.glob(os.path.join(glob.escape(part), "*.tar"))
        found = found or glob.glob(os.path.join(glob.escape(part), "shards", "*.tar"))
        if not found:
            raise DataError(f"{part}: neither manifest.json nor a *.tar file in it or in shards/")
        return sorted(found)
    names = list(_expand_braces(part))
    found = []
    for pattern in names:
        if glob.has_magic(pattern) and not os.path.exists(pattern):
            found.append(sorted(glob.glob(pattern)))
            if not found[-1]:
                raise DataError(f"{pattern}: no file matches this glob")
        else:
            found.append([pattern])
    advice = "name an existing tar or folder"
    if len(names) > 1:
        advice = "to go on without them, list the existing files with a glob such as '*.tar'"
    return _require(part, list(itertools.chain.from_iterable(found)), advice)


def _expand_braces(pattern: str) -> Iterator[str]:
    """`{000..331}` counts with the width of its first number, `{a,b}` lists; braces multiply."""
    match = _BRACE.search(pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    if numbers:
        first, last = numbers.groups()
        step = 1 if int(first) <= int(last) else -1
        span = range(int(first), int(last) + step, step)
        options = [str(number).zfill(len(first)) for number in span]
    else:
        options = match.group(1).split(",")
    for option in options:
        yield from _expand_braces(pattern[: match.start()] + option + pattern[match.end() :])


def _require(spec: str, paths: list[str], advice: str) -> list[str]:
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{spec}: {len(missing)} of {len(paths)} shards are missing: "
            f"{', '.join(missing[:10])}{', …' if missing[10:] else ''}; {advice}"
        )
    return paths

"""Imports of others without a package that they take along if it is there."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_out(package: str) -> Iterator[None]:
    """Within it an import of `package` fails, as where it is not installed; later ones work.

    One that is loaded already is left as it is.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[package]

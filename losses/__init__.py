"""Methods by name: `losses.build("unicl", {...})` imports `losses/unicl.py` and builds it.

The package itself loads no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from losses._method import Method


def names() -> list[str]:
    """All methods, one per file of this folder that does not start with an underscore."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def build(name: str, cfg: dict[str, Any] | None = None, dims: dict[str, int] | None = None):
    """Build the method `name`.

    Args:
        name: file name in `losses/` without `.py`.
        cfg: the method's own configuration keys (its `Config` dataclass).
        dims: sizes it may need: `embed_dim`, `image_width`, `text_width`, `num_classes`, and
            `vocab_size`, of the text tower.

    Raises:
        ValueError: unknown method or unknown key; the message names the nearest one.
    """
    method = find(name)
    return method(read_config(method.Config, dict(cfg or {}), f"loss.{name}"), dims or {})


def find(name: str) -> type[Method]:
    """The `Method` class of `losses/<name>.py`; raises ValueError for an unknown name."""
    if name not in names():
        raise ValueError(f"loss.name={name!r} is unknown; there are: {', '.join(names())}")
    return importlib.import_module(f"losses.{name}").Method


def read_config(kind: type, values: dict[str, Any], where: str) -> Any:
    """Dataclass `kind` from a mapping; raises ValueError naming the nearest key."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else "it has no options"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    return kind(**values)

"""Methods by name: `losses.build("unicl", {...})` imports `losses/unicl.py` and builds it."""

import importlib
import pkgutil
from typing import Any

from losses._method import Method, read_config


def names() -> list[str]:
    """All methods, one per file of this folder that does not start with an underscore."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def build(name: str, cfg: dict[str, Any] | None = None, dims: dict[str, int] | None = None):
    """Build the method `name`.

    Args:
        name: file name in `losses/` without `.py`.
        cfg: the method's own configuration keys (its `Config` dataclass).
        dims: sizes it may need: `embed_dim`, `image_width`, `text_width`, `num_classes`.

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

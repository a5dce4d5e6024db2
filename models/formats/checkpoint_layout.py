"""Where a checkpoint keeps its weights, and what stands before their names.

Wrappers and where they were read: torch.compile (`_orig_mod.`, torch/_dynamo/eval_frame.py),
DataParallel, DistributedDataParallel and DeepSpeed's engine (`module.`), FSDP and its activation
checkpointing (`_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, torch/distributed). A part
of a model may be wrapped alone, so these stand anywhere in a name. What else stands in front is an
attribute of the program that trained: `model.` or any other of a LightningModule, `net.`, `model.`
in our own checkpoints. It is found by what follows it.

Entries: open_clip, timm and Lightning write `state_dict`, Swin's and UniCL's script `model`,
DeepSpeed `module`, many scripts `model_state_dict`. Averaged weights are beside them: timm's
`state_dict_ema`, DeiT's `model_ema`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loaders.errors import DataError

ENTRIES = ("state_dict", "model", "model_state_dict", "module")
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
LEVELS = 3  # entries within entries

WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
# A name that every model of a layout has; what stands before it stands before all names.
MARKERS = (
    "logit_scale", "image_encoder.patch_embed.proj.weight", "visual.patch_embed.proj.weight",
)  # fmt: skip
# Beside `logit_scale` one of these: the projection of images, or one for images and texts.
OURS = ("image_projection.weight", "projection.weight")
METHOD = "method."  # a training method's own tensors, in our checkpoints


def find_weights(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The mapping of names to tensors within what `torch.load` returned.

    Averaged weights are never taken: beside the plain ones they are named in a printed line.

    Raises:
        DataError: several entries could be meant, only averaged weights are there, or none at all;
            names the entries, with the line of Python that saves one of them.
    """
    opened = f"torch.load({str(path)!r}, weights_only=True)"
    for _ in range(LEVELS + 1):
        plain, averaged = (
            [key for key in keys if _holds_tensors(content.get(key))]
            for keys in (ENTRIES, AVERAGED)
        )
        if len(plain) > 1 or (averaged and not plain):
            found = [*plain, *averaged]
            what = "several entries hold" if len(found) > 1 else "only averaged weights are here:"
            raise DataError(
                f"{path}: {what} {_quoted(found)}; save the one you want: "
                f"torch.save({opened}[{found[0]!r:.200}], 'NEW.pt')"
            )
        if not plain:
            break
        if averaged:
            others = _quoted(averaged)
            print(f"{path}: {plain[0]!r} is read, the averaged weights in {others} are not")
        content, opened = content[plain[0]], f"{opened}[{plain[0]!r}]"
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise DataError(_no_weights(content, path, opened))
    return content


def _quoted(names: Collection[Any]) -> str:
    return " and ".join(f"{name!r:.200}" for name in names)


def _no_weights(content: Mapping[str, Any], path: Path, opened: str) -> str:
    if keys := holding(content):
        return (
            f"{path}: the weights lie in {_quoted(keys)}; save the one you want: "
            f"torch.save({opened}[{keys[0]!r:.200}], 'NEW.pt')"
        )
    return f"{path}: no tensors; its entries are {[str(key)[:40] for key in content][:8]}"


def holding(content: Mapping[Any, Any]) -> list[Any]:
    """Keys of the entries that hold tensors, at most eight; usual names of weights first."""
    usual = {key: place for place, key in enumerate((*ENTRIES, *AVERAGED))}
    keys = [key for key, value in content.items() if _holds_tensors(value)]
    return sorted(keys, key=lambda key: usual.get(key, len(usual)))[:8]


def _holds_tensors(content: Any, levels: int = LEVELS) -> bool:
    if not isinstance(content, Mapping):
        return False
    if any(isinstance(value, Tensor) for value in content.values()):
        return True
    inner = (content.get(key) for key in (*ENTRIES, *AVERAGED))
    return levels > 0 and any(_holds_tensors(value, levels - 1) for value in inner)


def layout(names: Collection[str]) -> str | None:
    """Whose names these are: `unicl` (the release), `clip`, `ours`, or None."""
    if any(marker in names for marker in MARKERS[1:]):
        return "unicl"
    if "logit_scale" in names and any(name in names for name in OURS):
        return "ours"
    if "logit_scale" in names and any(name.startswith("visual.") for name in names):
        return "clip"
    return None


def plain_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` without wrappers and without what stands before all names.

    A state whose layout is not recognised only loses its wrappers. Of our own checkpoints the
    training method's tensors are left out.

    Raises:
        DataError: two names differ by wrappers alone, two models lie in one state dict, or tensors
            beside the model; names them, with the line of Python that keeps one model.
    """
    stored: dict[str, str] = {}
    for name in state:
        short = WRAPPER.sub("", name)
        if short in stored:
            raise DataError(
                f"{path}: {_quoted([stored[short], name])} are one name without its wrappers; save "
                "a state dict that has one of them"
            )
        stored[short] = name
    if any(f"model.{name}" in stored for name in OURS):
        stored = {short: name for short, name in stored.items() if not short.startswith(METHOD)}
    found = [prefix for prefix in _prefixes(stored) if layout(set(_below(prefix, stored)))]
    prefix, *more = found or [""]
    if more:
        raise DataError(
            f"{path}: {len(found)} models in one state dict, their names begin with "
            f"{_quoted(found)}; " + _keep(path, _one_of(found, stored))
        )
    if others := [name for short, name in stored.items() if not short.startswith(prefix)]:
        raise DataError(
            f"{path}: the model's names begin with {prefix!r:.200}, but beside it are "
            f"{_quoted(others[:3])}{' and more' if others[3:] else ''}; "
            + _keep(path, _one_of(found, stored))
        )
    return {short[len(prefix) :]: state[name] for short, name in stored.items()}


def _prefixes(names: Collection[str]) -> list[str]:
    """What stands before a marker, each once."""
    return sorted(
        {
            name.removesuffix(marker)
            for name in names
            for marker in MARKERS
            if name == marker or name.endswith(f".{marker}")
        }
    )


def _below(prefix: str, names: Collection[str]) -> Iterator[str]:
    return (name[len(prefix) :] for name in names if name.startswith(prefix))


def _one_of(prefixes: list[str], stored: Mapping[str, str]) -> str:
    """The condition on a stored name `k` that holds for the first prefix alone."""
    first, *others = (_as_stored(prefix, stored) for prefix in prefixes)
    within = tuple(prefix for prefix in others if prefix.startswith(first))
    conditions = [f"k.startswith({first!r})"] if first else []
    if within:
        conditions.append(f"not k.startswith({within!r})")
    return " and ".join(conditions)


def _as_stored(prefix: str, stored: Mapping[str, str]) -> str:
    """The prefix as the file has it, with its wrappers."""
    marker = next(marker for marker in MARKERS if f"{prefix}{marker}" in stored)
    return stored[f"{prefix}{marker}"].removesuffix(marker)


def _keep(path: Path, condition: str) -> str:
    return (
        "keep one: import pathlib, torch; from models.formats import weight_files; torch.save({"
        f"k: v for k, v in weight_files.read(pathlib.Path({str(path)!r}))[0].items() "
        f"if {condition}}}, 'NEW.pt')"
    )

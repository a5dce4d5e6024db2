"""`train.compile`: the towers go through torch.compile, which is tried at the start.

The towers are compiled in place, so names of parameters do not change, and loss, gathers and
DeepSpeed stay outside. Two things keep the step what it is: random numbers are drawn as without
compilation (gradient caching repeats a forward pass and must meet the same drop path), and the
number and length of texts are symbols of one graph: a graph for each shape of
`loaders.text_shapes` would be compiled a dozen times, and torch gives up after eight.

What was compiled stays on disk, and the next start of the same towers finds it there.
"""

import os
from pathlib import Path
from tempfile import gettempdir

import torch

from engine.dist import first_line
from loaders.errors import ConfigError
from models.base import Model


def compile_towers(model: Model, zero_stage: int, device: torch.device) -> None:
    """Compile the towers of a model, in place, at their first call.

    Args:
        zero_stage: the one of DeepSpeed's configuration. device: what the towers will run on.

    Raises:
        ConfigError: under ZeRO-3, whose hooks gather weights between the modules of a tower; or
            no compiler works on this machine.
    """
    if zero_stage == 3:
        raise ConfigError("train.compile=true does not work with ZeRO stage 3; use stage 0 to 2")
    # Random numbers are drawn in torch's order, instead of from the compiler's own generator.
    torch._inductor.config.fallback_random = True
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder())
    _try_compiler(device)
    for part, varies in model.graphs():
        part.compile(dynamic=varies)


def cache_folder() -> Path:
    """Where compiled towers are kept: TORCHINDUCTOR_CACHE_DIR if somebody has set it, else
    `unicl/torch_compile` in the user's cache folder (XDG_CACHE_HOME or ~/.cache).

    torch's default is in /tmp, which a cluster empties after each job. torch also writes that
    default into the variable when it is imported, so its name is not taken for somebody's choice.
    """
    chosen = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    torchs = chosen.parent == Path(gettempdir()) and chosen.name.startswith("torchinductor_")
    if chosen != Path() and not torchs:
        return chosen
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "unicl" / "torch_compile"


def announcement() -> str:
    """What the log says before a run that compiles."""
    return (
        "compiling the towers in the first step: the first time this takes minutes; kept in "
        f"{cache_folder()} for the next start"
    )


def _try_compiler(device: torch.device) -> None:
    """Compile one addition; raises ConfigError with what to install if that fails."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # raised by the compiler, its cache or Triton
        needed = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        raise ConfigError(
            f"train.compile=true: torch.compile does not work here: {first_line(error)}; it needs "
            f"{needed}; install it, or set train.compile=false"
        ) from error

"""Where a run was made: commit, versions, command, machines. No environment variables."""

import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from engine import dist

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torchvision", "triton", "deepspeed", "transformers", "tokenizers", "timm", "numpy",
    "pillow", "safetensors", "omegaconf",
)  # fmt: skip


def now() -> str:
    """Local time with its distance from UTC, to the second (ISO 8601)."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def facts() -> dict[str, Any]:
    """`git` (see `commit`), `versions` of python, CUDA and PACKAGES, and the `command` line."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"git": commit(), "versions": versions, "command": shlex.join(sys.orig_argv)}


def commit(root: Path = ROOT) -> dict[str, Any] | None:
    """`commit` of the code, and whether tracked files were `changed` since.

    None where the code is not in a checkout of its own, or git is missing or does not answer.
    """
    if not (root / ".git").exists():  # a checkout further up is not one of this code
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "status", "--porcelain=v2"]
    command += ["--branch", "--untracked-files=no"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.splitlines()
    found = [line.split()[2] for line in lines if line.startswith("# branch.oid ")]
    if not found or found[0] == "(initial)":
        return None
    return {"commit": found[0], "changed": any(not line.startswith("#") for line in lines)}


def machines(device: torch.device) -> list[dict[str, Any]]:
    """`host`, `device` and its `ranks`, one entry each kind of device of a host; collective."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    own = (socket.gethostname(), name)
    every: list[tuple[str, str]] = [own]
    if dist.world_size() > 1:
        every = [own] * dist.world_size()
        torch.distributed.all_gather_object(every, own)
    return [
        {"host": host, "device": kind, "ranks": [r for r, at in enumerate(every) if at == place]}
        for place in dict.fromkeys(every)
        for host, kind in [place]
    ]

"""Models from files: this repository's runs and exports, official UniCL, open_clip, OpenAI CLIP."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import models
from loaders.errors import ConfigError, DataError
from models import open_clip_config, open_clip_weights, weight_files
from models.config import ModelConfig
from models.official_unicl import convert, infer_config, read_official
from models.two_tower import TwoTower

# Weights of an open_clip folder, in open_clip's own order (open_clip/factory.py,
# _find_checkpoint_in_dir).
OPEN_CLIP_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors",
    "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedRun:
    """A model with what an evaluation row has to say about it.

    `cfg` has at least the `model:` section (image statistics, tokenizer and context length
    included); a run's is complete. `step` is None where the file does not say. `path` is the
    checkpoint folder of a run, else the file. `name` is for tables: the run folder's name, the
    folder's or the file's stem.
    """

    model: TwoTower
    cfg: dict[str, Any]
    step: int | None
    checkpoint_hash: str
    path: Path
    name: str


def load(path: str | Path) -> LoadedRun:
    """Load a model for evaluation, whoever trained it.

    Recognised are
    - a run folder or one of its checkpoint folders (`load_run`);
    - our exports: a `.pt` file, a `.safetensors` file or the folder of one;
    - a released UniCL file, both namings (`load_official_unicl`);
    - an open_clip folder (`open_clip_config.json` and weights), or such a weights file in it;
    - a state dict of OpenAI's CLIP (ViT or ModifiedResNet) with the sizes that its archive holds.

    Nothing but tensors and plain containers is unpickled.

    Raises:
        DataError: none of these, a part that our towers cannot express, weights that do not fit or
            are not finite, or a file that could run code when opened.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    state, facts = weight_files.read(path)
    if facts is not None:
        return _load_export(path, state, facts, path.stem)
    if any(f"{top}.patch_embed.proj.weight" in state for top in ("image_encoder", "visual")):
        return _loaded(load_official_unicl(path), path, path.stem)
    if any(name.startswith("visual.") for name in state) and "logit_scale" in state:
        return _load_clip(path, state, path.stem)
    raise DataError(
        f"{path}: not recognised; its keys begin with "
        f"{sorted({name.split('.')[0] for name in state})[:8]}. Known are our .pt and .safetensors "
        "exports, released UniCL files, and state dicts of open_clip or OpenAI's CLIP (not of "
        "transformers' CLIPModel)"
    )


def _load_folder(path: Path) -> LoadedRun:
    name = path.resolve().name
    if (path / open_clip_config.CONFIG_FILE).is_file():
        files = [path / file for file in OPEN_CLIP_FILES if (path / file).is_file()]
        if not files:
            raise DataError(
                f"{path}: none of {', '.join(OPEN_CLIP_FILES)} beside the configuration"
            )
        return _load_clip(files[0], weight_files.read(files[0])[0], name)
    weights = path / "model.safetensors"
    if weights.is_file() and (path / "config.json").is_file():
        state, facts = weight_files.read(weights)
        if facts is None:
            raise DataError(
                f"{path}: a folder for timm or transformers; give the run itself, or its export "
                "in the format pt, safetensors or open_clip"
            )
        return _load_export(weights, state, facts, name)
    return load_run(path)


def _load_clip(path: Path, state: dict[str, Tensor], name: str) -> LoadedRun:
    folder = path.parent
    if open_clip_config.is_openai(state):
        config = open_clip_config.openai_config(state)
    elif (folder / open_clip_config.CONFIG_FILE).is_file():
        config = open_clip_config.read_config(folder)
    else:
        raise DataError(
            f"{path}: these weights do not say which activation, head width and image statistics "
            f"they need. Put {open_clip_config.CONFIG_FILE} beside them, for example with "
            "python -c \"import json, open_clip; json.dump({'model_cfg': "
            "open_clip.get_model_config('ViT-B-32'), 'preprocess_cfg': {}}, "
            f"open('{folder / open_clip_config.CONFIG_FILE}', 'w'))\""
        )
    return _loaded(open_clip_weights.build(state, config, folder), path, name)


def _load_export(
    path: Path, state: dict[str, Tensor], facts: dict[str, Any], name: str
) -> LoadedRun:
    try:
        model = models.build(ModelConfig.from_dict(facts["config"]))
        model.load_state_dict(state)
    except (ConfigError, RuntimeError) as error:
        raise DataError(f"{path}: configuration and weights do not agree: {error}") from error
    return _loaded(model.eval(), path, name, facts["step"])


def _loaded(model: TwoTower, path: Path, name: str, step: int | None = None) -> LoadedRun:
    _refuse_non_finite(model, path)
    cfg = {"name": name, "model": dataclasses.asdict(model.cfg)}
    return LoadedRun(model, cfg, step, weight_files.digest(path), path, name)


def _refuse_non_finite(model: TwoTower, path: Path) -> None:
    names = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise DataError(
            f"{path}: NaN or infinite weights in {', '.join(names[:3])}{more}; the training "
            "diverged before this was saved, take an earlier checkpoint"
        )


def load_official_unicl(path: str | Path, allow_partial: bool = False) -> TwoTower:
    """Load a released UniCL checkpoint (`.pth`), of microsoft/UniCL or K-LITE/ELEVATER naming.

    The architecture (Swin-T or Swin-B, text width and depth, vocabulary, embedding size) comes
    from the shapes. Key names were read in microsoft/UniCL (model/model.py,
    model/text_encoder/transformer.py, model/image_encoder/swin_transformer.py). Prints how many
    of the model's tensors matched, and the names that did not.

    Args:
        path: the file; the weights may lie under `model` or `state_dict`.
        allow_partial: load what fits and leave the rest as initialised.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        DataError: the file cannot be read, is not such a checkpoint, or, without
            `allow_partial`, any tensor is missing, unexpected or of the wrong shape.
    """
    path = Path(path)
    state = read_official(path)
    model = models.build(infer_config(state, path))
    target = model.state_dict()
    converted, problems = convert(state, target)
    print(
        f"{path}: {len(converted)} of {len(target)} tensors matched, "
        + ", ".join(f"{len(names)} {reason}" for reason, names in problems.items())
    )
    listing = [f"{reason}: {', '.join(names)}" for reason, names in problems.items() if names]
    if listing and not allow_partial:
        raise DataError(
            f"{path}: refused, the weights do not fit the model. {'; '.join(listing)}. "
            "Pass allow_partial=True to load the rest anyway."
        )
    for line in listing:
        print(f"  {line}")
    model.load_state_dict(converted, strict=False)
    return model.eval()


def _locate_run(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint folder that `path` (either of the two) stands for."""
    if (path / "model.safetensors").is_file():
        run = path.parent.parent
        if not (run / "config.yaml").is_file():
            raise DataError(f"{path}: its run folder {run} has no config.yaml")
        return run, path
    if not (path / "config.yaml").is_file():
        raise DataError(
            f"{path}: neither a run folder (config.yaml, checkpoints/) nor a checkpoint folder "
            "(model.safetensors)"
        )
    pointer = path / "checkpoints" / "LAST_GOOD"
    if not pointer.is_file():
        raise DataError(f"{path}: no finished checkpoint yet ({pointer} does not exist)")
    checkpoint = pointer.parent / pointer.read_text().strip()
    if not (checkpoint / "model.safetensors").is_file():
        raise DataError(f"{pointer} names {checkpoint.name}, which has no model.safetensors")
    return path, checkpoint


def load_run(path: str | Path) -> LoadedRun:
    """Load the model of a run folder (its last good checkpoint) or of one checkpoint folder.

    Reads the keys `model.*` of `model.safetensors`; `method.*` belongs to training. Nothing
    pretrained is loaded beforehand.

    Returns:
        The model in evaluation mode on the CPU, the whole configuration, the step, and the
        SHA-256 of the weights file.

    Raises:
        DataError: a file is missing, or the weights do not fit the configuration exactly or are
            not finite.
    """
    run, checkpoint = _locate_run(Path(path))
    step = re.fullmatch(r"step_(\d+)", checkpoint.name)
    if step is None:
        raise DataError(f"{checkpoint}: folder name is not step_<number>")
    try:
        cfg = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{run / 'config.yaml'}: {error}") from None
    if not isinstance(cfg, dict) or "model" not in cfg:
        raise DataError(f"{run / 'config.yaml'}: no `model:` section")
    try:
        model = models.build(ModelConfig.from_dict(cfg["model"]).without_pretrained())
    except ConfigError as error:
        raise DataError(f"{run / 'config.yaml'}: {error}") from error
    weights = checkpoint / "model.safetensors"
    prefix = "model."
    state = {
        name.removeprefix(prefix): value
        for name, value in weight_files.read(weights)[0].items()
        if name.startswith(prefix)
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{weights}: does not fit {run / 'config.yaml'}: {error}") from error
    _refuse_non_finite(model, weights)
    name, digest = run.resolve().name, weight_files.digest(weights)
    return LoadedRun(model.eval(), cfg, int(step.group(1)), digest, checkpoint, name)

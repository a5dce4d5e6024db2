"""Models from files: this repository's runs and exports, official UniCL, open_clip, OpenAI CLIP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from loaders.errors import DataError
from models.base import Model
from models.formats import (
    checkpoint_layout,
    load_lines,
    official_unicl,
    open_clip,
    open_clip_config,
    openai_clip,
    plain,
    run_files,
    weight_files,
)
from models.loaded_run import LoadedRun

# Weights of a folder, in open_clip's own order (open_clip/factory.py, _find_checkpoint_in_dir), and
# the indexes of sharded ones, as DeepSpeed's zero_to_fp32.py and transformers write them.
FOLDER_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors",
    "pytorch_model.bin", "pytorch_model.pth", "model.pth", "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)  # fmt: skip


def load(path: str | Path) -> LoadedRun:
    """Load a model for evaluation, whoever trained it.

    Recognised are
    - a run folder or one of its checkpoint folders (`load_run`), the weights in them, and what
      DeepSpeed's `zero_to_fp32.py` made of one, with the run's `config.yaml` beside or above it;
    - our exports: a `.pt` file, a `.safetensors` file, or the folder of either;
    - a released UniCL file, both namings (`load_official_unicl`);
    - an open_clip folder (`open_clip_config.json` and weights), or such a weights file in it;
    - a state dict of OpenAI's CLIP (ViT or ModifiedResNet) with the sizes that its archive holds.

    Others' weights may lie in the entries and behind the wrappers that `checkpoint_layout` names.
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
    if checkpoint := run_files.checkpoint_of(path):
        return load_run(checkpoint)
    return _load_file(path, path.stem)


def _load_folder(path: Path) -> LoadedRun:
    name = path.resolve().name
    weights = next((path / file for file in FOLDER_FILES if (path / file).is_file()), None)
    if (path / open_clip_config.CONFIG_FILE).is_file():
        if weights is None:
            raise DataError(f"{path}: none of {', '.join(FOLDER_FILES)} beside the configuration")
        return _load_file(weights, name)
    script = next(path.glob("zero_to_fp32.py"), next(path.parent.glob("zero_to_fp32.py"), None))
    if weights is None and script and not run_files.owning_run(script):
        raise DataError(
            f"{path}: a checkpoint of DeepSpeed, whose weights may lie in parts; join them with "
            f"python {script} {script.parent} OUT and give the folder OUT"
        )
    if weights is None and not run_files.owning_run(path / "its file"):
        weights = _only_export(path)
    if weights is None or run_files.STEP.fullmatch(name) or (path / "checkpoints").is_dir():
        return load_run(path)
    return _load_file(weights, name)


def _only_export(path: Path) -> Path | None:
    """The file of a folder with an export in the format pt, which has the run's name."""
    found = [f for f in path.glob("*.pt") if not run_files.TRAINING_FILE.fullmatch(f.name)]
    return found[0] if len(found) == 1 else None


def _load_file(path: Path, name: str) -> LoadedRun:
    state, facts = weight_files.read(path)
    if facts is not None:
        return _loaded(plain.build(state, facts, path), path, name, facts["step"])
    state = checkpoint_layout.plain_names(state, path)
    kind = checkpoint_layout.layout(state)
    if kind == "unicl":
        return _loaded(official_unicl.build(state, path), path, name)
    if kind == "ours":
        config = run_files.config_for(path)
        cfg, model = run_files.read(config)
        _fit(model, state, path, config)
        step = run_files.step_of(path)
        return LoadedRun(model, cfg, step, weight_files.digest(path), path, name)
    if kind == "clip":
        return _load_clip(path, state, name)
    if (path.parent / "config.json").is_file():
        lines = load_lines.of_folder(path.parent)
        raise DataError(
            f"{path.parent}: a folder for timm or transformers; "
            + (f"load it with [{'; '.join(lines.splitlines())}], or " if lines else "")
            + "give the run itself, or its export in the format pt, safetensors or open_clip"
        )
    raise DataError(
        f"{path}: not recognised; its keys begin with "
        f"{sorted({name.split('.')[0] for name in state})[:8]}. Known are our .pt and .safetensors "
        "exports, released UniCL files, and state dicts of open_clip or OpenAI's CLIP (not of "
        "transformers' CLIPModel)"
    )


def _load_clip(path: Path, state: dict[str, Tensor], name: str) -> LoadedRun:
    folder = path.parent
    if openai_clip.is_openai(state):
        config = openai_clip.config(state)
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
    return _loaded(open_clip.build(state, config, folder), path, name)


def _loaded(model: Model, path: Path, name: str, step: int | None = None) -> LoadedRun:
    _refuse_non_finite(model, path)
    cfg = {"name": name, "model": dataclasses.asdict(model.cfg)}
    return LoadedRun(model, cfg, step, weight_files.digest(path), path, name)


def _refuse_non_finite(model: Model, path: Path) -> None:
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


def load_official_unicl(path: str | Path, allow_partial: bool = False) -> Model:
    """Load a released UniCL checkpoint (`.pth`), of microsoft/UniCL or K-LITE/ELEVATER naming.

    The architecture (Swin-T or Swin-B, text width and depth, vocabulary, embedding size) comes
    from the shapes. Key names were read in microsoft/UniCL (model/model.py,
    model/text_encoder/transformer.py, model/image_encoder/swin_transformer.py). Prints how many
    of the model's tensors matched, and the names that did not.

    Args:
        path: the file; `checkpoint_layout` says where in it the weights may lie.
        allow_partial: load what fits and leave the rest as initialised.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        DataError: the file cannot be read, is not such a checkpoint, or, without
            `allow_partial`, any tensor is missing, unexpected or of the wrong shape.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    state = checkpoint_layout.plain_names(weight_files.read(path)[0], path)
    return official_unicl.build(state, path, allow_partial)


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
    run, checkpoint = run_files.locate(Path(path))
    step = run_files.STEP.fullmatch(checkpoint.name)
    if step is None:
        raise DataError(f"{checkpoint}: folder name is not step_<number>")
    prefix = "model."
    weights = checkpoint / run_files.WEIGHTS
    config = run / "config.yaml"
    cfg, model = run_files.read(config)
    state = {
        name.removeprefix(prefix): value
        for name, value in weight_files.read(weights)[0].items()
        if name.startswith(prefix)
    }
    _fit(model, state, weights, config)
    name, digest = run.resolve().name, weight_files.digest(weights)
    return LoadedRun(model, cfg, int(step.group(1)), digest, checkpoint, name)


def _fit(model: Model, state: dict[str, Tensor], weights: Path, config: Path) -> None:
    """Load a run's weights into the model of its configuration; evaluation mode."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{weights}: does not fit {config}: {error}") from error
    _refuse_non_finite(model, weights)
    model.eval()

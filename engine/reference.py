"""What a run of a model of the kind `reference` makes sure of before anything is built."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine import config_paths
from loaders.errors import ConfigError, DataError
from loaders.manifest import ShardInfo, ShardSet
from models import reference_folder
from models.config import ReferenceConfig


def settle(cfg: DictConfig, sources: Sequence[ShardSet]) -> list[str]:
    """Write into `cfg` which reference folder is meant, by full path and checksum.

    So RUN/config.yaml says with which reference a model was trained, wherever it is read.

    Returns:
        A line for the plan; none for other kinds of models.

    Raises:
        DataError: no such folder, a damaged one, or another one than the configuration names.
        ConfigError: it holds too little, or pairs that are trained on.
    """
    section = OmegaConf.select(cfg, "model.reference")
    if section is None:
        return []
    reference = ReferenceConfig.from_dict(OmegaConf.to_container(section, resolve=True))
    try:
        folder = reference_folder.find(reference)
    except DataError as error:
        raise DataError(f"{error}{config_paths.advice(reference.folder)}") from None
    _refuse_shared(folder, sources)
    for key, value in (("folder", str(folder.path)), ("checksum", folder.checksum)):
        OmegaConf.update(cfg, f"model.reference.{key}", value, force_add=True)
    return [
        f"reference {folder.path}: {folder.samples} pairs of {folder.facts['name']}, "
        f"{reference.neighbours} looked up for each image, checksum {folder.checksum[:12]}"
    ]


def identity(model: dict[str, Any]) -> dict[str, Any]:
    """The `model:` section without its reference, and that with its checksum for its path.

    Two keys, so that a refusal to continue names the one that differs.
    """
    if not model.get("reference"):
        return {"model": model}
    kept = {key: value for key, value in model.items() if key != "reference"}
    reference = {key: value for key, value in model["reference"].items() if key != "folder"}
    return {"model": kept, "model.reference": reference}


def _refuse_shared(folder: reference_folder.ReferenceFolder, sources: Sequence[ShardSet]) -> None:
    """ConfigError if a shard of the reference is trained on: a pair would find itself.

    Shards are compared as wholes, by checksum where both are known, else by name, size and count.
    """
    held = [ShardInfo(**shard) for shard in folder.facts["shards"]]
    known = {shard.sha256 for shard in held if shard.sha256}
    sums = {_description(shard): shard.sha256 for shard in held}

    def is_held(shard: ShardInfo) -> bool:
        if shard.sha256 and shard.sha256 in known:
            return True
        place = _description(shard)
        return place in sums and None in (shard.sha256, sums[place])

    for source in sources:
        shared = [Path(shard.path).name for shard in source.shards if is_held(shard)]
        if shared:
            raise ConfigError(
                f"data.{source.kind}: {len(shared)} of {len(source.shards)} shards of "
                f"{source.name} are in the reference {folder.path} too ({', '.join(shared[:3])}); "
                "a reference is held out. Train on the other shards, by a brace range such as "
                "D/shards/{00001..00004}.tar, or make a reference of other pairs"
            )


def _description(shard: ShardInfo) -> tuple[str, int, int]:
    return Path(shard.path).name, shard.bytes, shard.samples

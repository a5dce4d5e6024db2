"""Features of a set of pairs by two frozen encoders, for `eval.reference`."""

import argparse
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from loaders import tokenizers, views
from loaders.decoders import BadImage, decoder
from loaders.errors import ConfigError, DataError
from loaders.manifest import MissingMember, ShardSet
from loaders.progress import Progress
from loaders.texts import BadText, read_captions
from loaders.workers import GuardedLoader
from models import reference_folder, weights
from models.config import ImageConfig, TextConfig
from models.image_timm import PRESETS, TimmTower
from models.text_hf import HuggingFaceTower

ROUNDING = 1e-4  # of features of unit length


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text tower: token ids (n, L) -> pooled (n, width); `tokenize` makes the ids."""

    tower: nn.Module
    tokenize: tokenizers.Tokenizer
    name: str


class Pairs(Dataset):
    """(pixels (3, size, size) uint8, caption, (key, shard, SHA-256)) of each pair, or, of one that
    cannot be used, the reason."""

    def __init__(self, shards: ShardSet, size: int, caption: str) -> None:
        self.shards, self.caption = shards, caption
        self.view, self.decode = views.build_eval(size, size), decoder()

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> tuple[Tensor, str, tuple[str, str, str]] | str:
        try:
            data = self.shards.read_image(i)
            caption = read_captions(self.shards, i, self.caption)[0]
            pixels = self.view(self.decode(data))
        except (BadImage, BadText, MissingMember) as error:
            return error.reason
        place = self.shards.key(i), Path(self.shards.shard_of(i)).name
        return pixels, caption, (*place, hashlib.sha256(data).hexdigest())


def make(args: argparse.Namespace, shards: ShardSet) -> str:
    """Make the folder `args.output` of all pairs of `shards` that can be used.

    Args:
        args: of `eval.reference`.

    Returns:
        What was made, in words.

    Raises:
        ConfigError: an encoder that is none. DataError: one that cannot be read, or no pair that
            can be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower, image, name = image_encoder(args.encoder)
    text = text_encoder(args.text_encoder)
    facts = {
        "name": shards.name,
        "caption": args.caption,
        "image": {"name": name, "sha256": digest_of(tower)},
        "text": {"name": text.name, "sha256": digest_of(text.tower)},
        "shards": [
            dataclasses.asdict(dataclasses.replace(shard, path=Path(shard.path).name))
            for shard in shards.shards
        ],
    }
    dataset = Pairs(shards, image.size, args.caption)
    left_out: Counter[str] = Counter()
    found = list(_encoded(dataset, (tower.to(device), image), text, device, args, left_out))
    if not found:
        raise DataError(f"{shards.name}: no pair can be used: {dict(left_out)}")
    images, texts, samples = ([row for batch in found for row in batch[n]] for n in range(3))
    facts["left_out"] = dict(left_out)
    reference_folder.write(
        args.output,
        torch.stack(images),
        torch.stack(texts),
        (tower.cpu(), image),
        samples,
        facts,
    )
    return (
        f"{args.output}: {len(samples)} pairs of {shards.name}, {sum(left_out.values())} left out"
        f"{f' ({dict(left_out)})' if left_out else ''}"
    )


def image_encoder(source: str) -> tuple[TimmTower, ImageConfig, str]:
    """The image tower of a model of ours, or timm's with its weights: tower in evaluation mode,
    configuration without starting weights, name.

    Raises:
        ConfigError: neither; or weights that cannot be had. DataError: as `models.weights.load`.
    """
    if Path(source).expanduser().exists():
        run = weights.load(Path(source).expanduser())
        if not isinstance(getattr(run.model, "image", None), TimmTower):
            raise ConfigError(f"--encoder {source}: this model has no image tower of its own")
        cfg = run.model.cfg.without_pretrained().image
        return _rebuilt(run.model.image, cfg, source), cfg, run.name
    name, _ = PRESETS.get(source, (source, {}))
    try:
        known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:  # a known architecture, but no such weights
        known = None
    if known is None or not known.has_weights:
        raise ConfigError(
            f"--encoder {source}: neither a run, checkpoint or export that is there, nor a timm "
            "model with weights"
        )
    cfg = ImageConfig(name, known.input_size[-1], {"pretrained": True}, known.mean, known.std)
    try:
        tower = TimmTower(cfg).eval()
    except OSError as error:
        raise ConfigError(f"--encoder {source}: its weights cannot be had: {error}") from error
    return tower, dataclasses.replace(cfg, kwargs={}), f"timm {source}"


def _rebuilt(tower: TimmTower, cfg: ImageConfig, source: str) -> TimmTower:
    """What a model will build of the folder; ConfigError if it computes something else.

    Towers of other projects' weights may have parts that their configuration does not name.
    """
    images = torch.randn(2, 3, cfg.size, cfg.size, generator=torch.Generator().manual_seed(0))
    again = TimmTower(cfg).eval()
    try:
        again.load_state_dict(tower.state_dict())
        with torch.inference_mode():
            ours, theirs = (F.normalize(part(images)[0], dim=-1) for part in (again, tower))
        same = torch.allclose(ours, theirs, atol=ROUNDING)
    except RuntimeError:
        same = False
    if not same:
        raise ConfigError(
            f"--encoder {source}: its image tower cannot be rebuilt from its configuration; give a "
            "run of ours, or the name of a timm model"
        )
    return again


def text_encoder(source: Path) -> TextEncoder:
    """The text tower of a model of ours, or of a folder of transformers (mean over the tokens).

    Raises:
        ConfigError: a folder that is no encoder. DataError: as `models.weights.load`.
    """
    config = source / "config.json"
    if config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8")):
        cfg = TextConfig("hf", hf_name=str(source), tokenizer=str(source), pooling="mean")
        tower, name = HuggingFaceTower(cfg), source.resolve().name
        positions = getattr(tower.encoder.config, "max_position_embeddings", cfg.context_length)
        length = min(cfg.context_length, positions)
        cfg = dataclasses.replace(cfg, context_length=length)
    else:
        run = weights.load(source)
        cfg, tower, name = run.model.cfg.text, getattr(run.model, "text", None), run.name
        if tower is None:
            raise ConfigError(f"--text-encoder {source}: this model has no text tower of its own")
    tokenizer = tokenizers.build(cfg.tokenizer, cfg.context_length)
    return TextEncoder(tower.eval(), tokenizer, name)


def digest_of(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of a module's weights and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@torch.inference_mode()
def _encoded(
    dataset: Pairs,
    encoder: tuple[TimmTower, ImageConfig],
    text: TextEncoder,
    device: torch.device,
    args: argparse.Namespace,
    left_out: Counter[str],
) -> Iterator[tuple[Tensor, Tensor, list[tuple[str, str, str]]]]:
    """Rows (n, d_u) and (n, d_w) float16 on the CPU, and samples, a batch at a time."""
    tower, cfg = encoder
    text.tower.to(device)
    loader = GuardedLoader(
        dataset,
        batch_size=args.batch_size,
        num_workers=args.workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    bar = Progress(desc="encoding", unit="sample", total=len(dataset))
    for batch in loader:
        bar.update(len(batch))
        left_out.update(item for item in batch if isinstance(item, str))
        good = [item for item in batch if not isinstance(item, str)]
        if not good:
            continue
        pixels, captions, samples = zip(*good, strict=True)
        images = views.normalize(torch.stack(pixels).to(device), cfg.mean, cfg.std)
        ids = text.tokenize(list(captions)).to(device)
        pooled = tower(images)[0], text.tower(ids)[0]
        rows = (F.normalize(part.float(), dim=-1).half().cpu() for part in pooled)
        yield *rows, list(samples)
    bar.close()

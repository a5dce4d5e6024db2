"""What both sides of `benchmarks.step` start from: shards of captioned drawings, and weights."""

import io
import json
import random
import tarfile
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import models
from loaders import manifest
from loaders.texts import read_caption
from models.export import export
from models.formats.open_clip_config import CONFIG_FILE

IMAGE_SIZE = (256, 256)  # as img2dataset stores web images; drawings of 64 pixels, enlarged
WORDS = (8, 20)
TAIL = (
    "with plain flat colours on an empty white background seen from the front and made by hand "
    "for everyone to use"
)


def write_shards(folder: Path, samples: int, shards: int) -> Path:
    """FOLDER/{00000..}.tar with clip art and captions of WORDS words, `sizes.json` beside them.

    More samples than drawings repeat drawings, with captions of other lengths.
    """
    source, rng = manifest.open_shards("data/quickstart/openclipart_train"), random.Random(0)
    folder.mkdir(parents=True)
    sizes = {}
    for shard in range(shards):
        path = folder / f"{shard:05}.tar"
        chosen = range(shard, samples, shards)
        sizes[path.name] = len(chosen)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in chosen:
                index = number % len(source)
                words = [
                    "a",
                    "drawing",
                    "of",
                    *read_caption(source, index, "txt").split(),
                    *TAIL.split(),
                ]
                caption = " ".join(words[: rng.randint(*WORDS)])
                file = io.BytesIO()
                picture = Image.open(io.BytesIO(source.read_image(index)))
                picture.resize(IMAGE_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                for suffix, data in (("jpg", file.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:09}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def write_weights(folder: Path, model: dict, seed: int) -> Path:
    """An open_clip folder with the weights that `train.py` starts from with this seed.

    `model`: the `model:` section.
    """
    torch.manual_seed(seed)
    state = {f"model.{k}": v.contiguous() for k, v in models.build(model).state_dict().items()}
    checkpoint = folder / "run/checkpoints/step_0000000"
    checkpoint.mkdir(parents=True)
    save_file(state, checkpoint / "model.safetensors")
    (folder / "run/checkpoints/LAST_GOOD").write_text(checkpoint.name)
    (folder / "run/config.yaml").write_text(yaml.safe_dump({"name": "run", "model": model}))
    export(folder / "run", "open_clip", folder / "open_clip")
    # An export is for inference and leaves out drop path, which timm sets to 0.1 for Swin.
    path = folder / "open_clip" / CONFIG_FILE
    content = json.loads(path.read_text())
    content["model_cfg"]["vision_cfg"]["timm_drop_path"] = 0.0
    path.write_text(json.dumps(content))
    return folder / "open_clip"

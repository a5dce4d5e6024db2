"""Reference folders of random features, with a small frozen encoder that has batch norms."""

import torch
from torch.nn import functional as F

from models import reference_folder
from models.config import ImageConfig, ReferenceConfig
from models.image_timm import TimmTower
from tests.engine.run_folder import randomize

ENCODER = ImageConfig("test_resnet", 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
TEXT_WIDTH = 6


def make(folder, samples=9, seed=0, shards=(), encoder=ENCODER):
    """A folder of `samples` random pairs; returns its path as text and its checksum."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        tower = randomize(TimmTower(encoder))
    image, text = (
        F.normalize(torch.randn(samples, width, generator=generator), dim=-1)
        for width in (tower.width, TEXT_WIDTH)
    )
    names = [(f"{row:09d}", "00000.tar", f"{row:064x}") for row in range(samples)]
    facts = {"name": "random", "shards": list(shards)}
    reference_folder.write(folder, image, text, (tower, encoder), names, facts)
    found = reference_folder.find(ReferenceConfig(str(folder), neighbours=1))
    return str(folder), found.checksum

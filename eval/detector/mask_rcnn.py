"""Mask R-CNN with FPN (torchvision) around a trained image trunk."""

import copy

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from loaders.errors import ConfigError
from models.image_timm import TimmTower

STRIDES = (4, 8, 16, 32)
CHANNELS = 256


def detection_trunk(tower: TimmTower, name: str) -> nn.Module:
    """A copy of the tower's trunk that takes images of any size, with the very same weights.

    Swin keeps the window of each stage as trained, partitions and shifts in every stage (at 224
    pixels the last stage is one window and is not shifted), pads to whole windows and builds its
    masks for the size that it sees: what Swin's detection code does. The relative position tables
    stay as they are.

    Raises:
        ConfigError: the trunk has no features at the strides 4, 8, 16 and 32.
    """
    trunk = copy.deepcopy(tower.trunk)
    vars(trunk).pop("forward", None)  # the tower's shortcut, bound to the original
    strides = [entry["reduction"] for entry in getattr(trunk, "feature_info", [])]
    if not set(STRIDES) <= set(strides) or not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(
            f"image tower '{name}' has features at the strides {strides}; detection needs "
            f"{', '.join(map(str, STRIDES))}: Swin, ResNet and other trunks with four stages"
        )
    if isinstance(trunk, timm.models.SwinTransformer):
        windows = [stage.blocks[0].window_size for stage in trunk.layers]
        trunk.set_input_size(window_size=windows, always_partition=True)
        trunk.patch_embed.strict_img_size = False
        trunk.patch_embed.dynamic_img_pad = True
        for stage in trunk.layers:
            for block in stage.blocks:
                block.dynamic_mask, block.attn_mask = True, None
    elif getattr(trunk, "patch_embed", None) is not None:
        trunk.patch_embed.strict_img_size = False
    return trunk


class PyramidBackbone(nn.Module):
    """Trunk and feature pyramid: images (b, 3, H, W) -> {"0" … "3", "pool"} of 256 channels at the
    strides 4, 8, 16, 32 and 64.

    As in mmdetection's baselines, which Table 5's first row resembles (`eval.detection`): Swin's
    stages end in layer norms of their own; a trunk with batch norm keeps its statistics, and its
    stem and first stage are frozen.
    """

    def __init__(self, tower: TimmTower, name: str) -> None:
        super().__init__()
        self.trunk = detection_trunk(tower, name)
        info = list(self.trunk.feature_info)
        self.stages = [
            max(i for i, entry in enumerate(info) if entry["reduction"] == stride)
            for stride in STRIDES
        ]
        widths = [info[i]["num_chs"] for i in self.stages]
        self.batch_norms = [m for m in self.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
        transformer = not self.batch_norms
        self.norms = nn.ModuleList(
            nn.LayerNorm(w) if transformer else nn.Identity() for w in widths
        )
        self.fpn = FeaturePyramidNetwork(widths, CHANNELS, LastLevelMaxPool())
        self.out_channels = CHANNELS
        unused = ["norm"]  # the tower's last norm, replaced by those above
        frozen = unused if transformer else [*unused, "conv1", "bn1", "layer1"]
        for part, parameter in self.trunk.named_parameters():
            parameter.requires_grad = part.split(".")[0] not in frozen

    def train(self, mode: bool = True) -> "PyramidBackbone":
        super().train(mode)
        for norm in self.batch_norms:
            norm.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.trunk.forward_intermediates(
            images, indices=self.stages, intermediates_only=True
        )
        normed = {
            str(level): norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
            for level, (features, norm) in enumerate(zip(maps, self.norms, strict=True))
        }
        return self.fpn(normed)


def build(
    tower: TimmTower,
    name: str,
    categories: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    short_side: int,
) -> MaskRCNN:
    """Mask R-CNN for `categories` classes beside the background.

    Takes lists of images (3, H, W) in 0-1, normalises them with the tower's own constants and
    resizes the short side to `short_side`, the long one to 1333/800 of that at most. Anchors
    (32 to 512 pixels, one size a level), samples and thresholds are torchvision's defaults, which
    are Detectron's: 2,000 proposals, 256 and 512 samples, 100 detections.
    """
    return MaskRCNN(
        PyramidBackbone(tower, name),
        num_classes=categories + 1,
        min_size=short_side,
        max_size=round(short_side * 1333 / 800),
        image_mean=list(mean),
        image_std=list(std),
    )


def parameter_groups(model: MaskRCNN, weight_decay: float) -> list[dict]:
    """Parameters with and without decay: none on norms and relative position tables (Swin)."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = id(parameter) in norms or "relative_position_bias_table" in name
            (spared if free else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def optimizer(model: MaskRCNN) -> tuple[torch.optim.Optimizer, int, str]:
    """Optimizer, warm-up steps and their description, for a batch of 16 images.

    Source: mmdetection, configs/swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco.py and
    configs/_base_/schedules/schedule_1x.py.
    """
    if model.backbone.batch_norms:
        found = torch.optim.SGD(
            (p for p in model.parameters() if p.requires_grad),
            lr=0.02,
            momentum=0.9,
            weight_decay=1e-4,
        )
        return found, 500, "SGD 0.02, momentum 0.9, decay 1e-4"
    found = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4)
    return found, 1000, "AdamW 1e-4, decay 0.05 but on norms and position tables"

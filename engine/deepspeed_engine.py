"""DeepSpeed: its JSON made complete and checked, the trained module, the engine.

DeepSpeed's own defaults are never trusted in silence: the batch triple is derived from the run's
configuration, every "auto" is resolved or refused (DeepSpeed reads `bf16.enabled: "auto"` as
False), gradient clipping must be stated (the library's silent default is 1.0), and every parameter
starts on a 16-byte line.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from engine import deepspeed_patches
from engine.teacher import Teacher
from loaders.errors import ConfigError
from losses._gather import Gather

# Stages whose parameters lie in one flat buffer, back to back unless DeepSpeed is told otherwise.
FLAT_STAGES = (1, 2)
_NAMES = {torch.bfloat16: ("bf16", "bfloat16"), torch.float16: ("fp16", "float16", "half")}


class TrainModule(nn.Module):
    """Model, method and its teacher in one module, so that DeepSpeed saves and restores them all.

    Attributes:
        teacher: a `engine.teacher.Teacher` if the method asks for one, else None.
    """

    def __init__(self, model: nn.Module, method: nn.Module):
        super().__init__()
        self.model, self.method = model, method
        self.teacher = Teacher(model, method) if method.teacher else None

    def forward(self, batch: dict[str, Tensor], gather: Gather | None = None) -> dict[str, Tensor]:
        """Features of one micro-batch, or with `gather` the loss of a batch of one micro-batch.

        Args:
            batch: tensors on the device, described in docs/design.md ("Batch").
        """
        features = self.method.encode(self.model, batch)
        if gather is None:
            return features
        return self.method({**features, **self.targets(batch)}, batch["label"], gather)

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the method wants of its teacher for one micro-batch; empty without a teacher.

        The teacher's weights are float32, and its products run in the type of the student's: under
        bf16 and fp16 by autocast, which keeps norms and softmax in float32.
        """
        if self.teacher is None:
            return {}
        images = batch["image"]
        half = images.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(images.device.type, images.dtype, enabled=half):
            return self.method.targets(self.teacher, batch)


def read_json(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON file; raises ConfigError naming file and line."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed configuration {path}: {error}") from None


def resolve(
    ds: dict[str, Any], cfg: DictConfig, world_size: int, path: str = "ds_config"
) -> dict[str, Any]:
    """A complete DeepSpeed configuration for this run.

    Args:
        ds: what the JSON file holds; not changed.
        cfg: the run's configuration: global batch, accumulation and clipping come from it.
        world_size: number of ranks.
        path: name of the file, for messages.

    Raises:
        ConfigError: the batch does not divide, a number contradicts the run's configuration,
            clipping is not stated, an "auto" is left, the file brings an optimizer, graphs are to
            be kept under stage 3, parameters are not to be aligned, or stage 0 is to sum 16-bit
            gradients in another type.
    """
    ds = json.loads(json.dumps(ds))
    batch, pieces = cfg.train.global_batch, cfg.train.accumulation
    if batch % (world_size * pieces):
        raise ConfigError(
            f"train.global_batch={batch} is not divisible by {world_size} ranks x "
            f"train.accumulation={pieces}; use a multiple of {world_size * pieces}"
        )
    _refuse_decided(ds, path)
    derived = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // (world_size * pieces),
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": float(cfg.optim.grad_clip_norm),
    }
    for key, value in derived.items():
        if ds.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"{path}: {key}={ds[key]} contradicts the run's configuration, which gives "
                f'{value}; write "auto" there'
            )
        ds[key] = value
    if stage(ds) == 3 and cfg.train.graph_memory_gb:
        raise ConfigError(
            f"{path}: train.graph_memory_gb={cfg.train.graph_memory_gb} does not work with ZeRO "
            "stage 3, whose gradients are wrong when several graphs are alive; set it to 0, or "
            "use stage 0 to 2"
        )
    _align(ds, path)
    _check_sums(ds, path)
    left = list(_autos(ds))
    if left:
        raise ConfigError(
            f'{path}: DeepSpeed does not resolve "auto"; give a value for {", ".join(left)}'
        )
    ds.setdefault("steps_per_print", 10**9)
    return ds


def _refuse_decided(ds: dict[str, Any], path: str) -> None:
    """ConfigError for what is decided elsewhere, or would be decided in silence."""
    for section in ("optimizer", "scheduler"):
        if section in ds:
            raise ConfigError(
                f"{path}: '{section}' is decided by the run's configuration (optim.*); remove it"
            )
    if "gradient_clipping" not in ds:
        raise ConfigError(
            f"{path}: 'gradient_clipping' is missing and DeepSpeed would silently clip at 1.0; "
            'write "gradient_clipping": "auto" to take optim.grad_clip_norm'
        )


def additions(before: dict[str, Any], ds: dict[str, Any]) -> list[str]:
    """What `resolve` added for a reason that the run should tell, a line each.

    Args:
        before: what the file holds. ds: what `resolve` made of it.
    """
    stated = before.get("zero_optimization", {}).get("parameter_alignment", "auto")
    if stage(ds) in FLAT_STAGES and stated == "auto":
        return [
            "zero_optimization.parameter_alignment=true was added: every parameter starts on a "
            "16-byte line, which kernels on a GPU need"
        ]
    return []


def precision(ds: dict[str, Any]) -> torch.dtype:
    """Type of weights and activations in the forward pass: bfloat16, float16 or float32."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds.get(key, {}).get("enabled"):
            return dtype
    return torch.float32


def stage(ds: dict[str, Any]) -> int:
    """ZeRO stage of a configuration, 0 to 3."""
    return ds.get("zero_optimization", {}).get("stage", 0)


def initialise(
    module: TrainModule, optimizer: torch.optim.Optimizer, ds: dict[str, Any], device: torch.device
):
    """The DeepSpeed engine around `module`; the process group must exist already.

    Raises:
        ConfigError: a 0-D parameter, which DeepSpeed's first broadcast cannot take.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns while it finds out
    import deepspeed
    import deepspeed.ops

    flat = [name for name, p in module.named_parameters() if p.ndim == 0]
    if flat:
        raise ConfigError(f"0-D parameters crash DeepSpeed, give them shape (1,): {flat}")
    # Deprecations that only DeepSpeed can follow; ours are seen in the tests.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    if device.type == "cpu":
        # Its shared-memory all-reduce would be compiled now (minutes), and a build that was
        # killed leaves a lock on which the next start waits for ever. gloo is enough here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.ops.__compatible_ops__["deepspeed_ccl_comm"] = False
    # The first reduction imports Muon, an optimizer that is not used. Its functions are compiled by
    # a decorator, which would load torch's compiler: more than a second of each start.
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
        import deepspeed.runtime.zero.muon.original_muon
    deepspeed_patches.align_whole_parameters()
    with _aligning_optimizer():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=ds, dist_init_required=False
        )
    deepspeed_patches.shorten(engine)
    if precision(ds) != torch.float32:
        reads_images, *_ = module.model.towers().values()
        _cast_buffers(reads_images, precision(ds), device)
    return engine


def layout(engine) -> tuple[int, bool]:
    """(ZeRO stage, whether padding lies between parameters): what a checkpoint must share with an
    engine that is to read it as DeepSpeed wrote it."""
    number = engine.zero_optimization_stage()
    return number, number in FLAT_STAGES and bool(engine.zero_parameter_alignment())


def checkpoint_classes() -> list[type]:
    """The classes besides tensors and containers in DeepSpeed's checkpoints (0.19.8).

    Read from files of ZeRO 0 to 3 with `torch.serialization.get_unsafe_globals_in_checkpoint`.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def full_state(engine) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) of all weights and buffers, whole under every ZeRO stage; collective.

    Weights are those of the forward pass: float32, or the 16-bit ones under bf16 and fp16.
    """
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if name in parameters and hasattr(tensor, "ds_id"):
            with deepspeed.zero.GatheredParameters([tensor]):
                whole = tensor.detach().cpu().clone()
        else:
            whole = tensor.detach().cpu().clone()
        yield name, whole.contiguous()


def scale(engine) -> float:
    """The multiplier of the cosines as the next forward pass will use it; collective."""
    import deepspeed

    model = engine.module.model
    with deepspeed.zero.GatheredParameters([model.logit_scale]):
        return float(model.scale().detach())


def _align(ds: dict[str, Any], path: str) -> None:
    """Let padding between parameters start each of them on a 16-byte line; DeepSpeed's default is
    none. cuDNN's float32 batch norm reads 16 bytes at once, and stops at "misaligned address"."""
    if stage(ds) not in FLAT_STAGES:
        return  # parameters have storages of their own (0), or are made whole one by one (3)
    zero = ds["zero_optimization"]
    if zero.get("parameter_alignment", "auto") not in ("auto", True):
        raise ConfigError(
            f"{path}: zero_optimization.parameter_alignment={zero['parameter_alignment']} leaves "
            "parameters between 16-byte lines, where kernels of a GPU fail (misaligned address) or "
            "are slow; remove the key or set it to true"
        )
    zero["parameter_alignment"] = True


def _check_sums(ds: dict[str, Any], path: str) -> None:
    """DeepSpeed's stage 0 has no sums of micro-batches' gradients in another type than theirs."""
    asked = ds.get("data_types", {}).get("grad_accum_dtype")
    dtype = precision(ds)
    if stage(ds) or dtype == torch.float32 or asked is None:
        return
    if str(asked).removeprefix("torch.") not in _NAMES[dtype]:
        raise ConfigError(
            f"{path}: data_types.grad_accum_dtype={asked} does not work with ZeRO stage 0 and "
            f"{_NAMES[dtype][0]}; remove it, or use stage 1, which sums in float32"
        )


def _cast_buffers(tower: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give an image tower's constants the type of its weights, in place.

    DeepSpeed 0.19.8 casts weights alone. Swin adds its mask of shifted windows to the logits of
    attention, which in float32 no longer go with values of 16 bits. Statistics of batch norms stay
    float32, except on a CPU, where torch has no such batch norm with weights of 16 bits.
    """
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and device.type != "cpu":
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


@contextlib.contextmanager
def _aligning_optimizer() -> Iterator[None]:
    """Let stage 1 with bfloat16 weights and float32 sums use the optimizer of stages 1 and 2.

    DeepSpeed 0.19.8 takes a second one, `BF16_Optimizer`, in this one case, and that knows no
    `parameter_alignment`. The first takes the same case when the optimizer is offloaded.
    """
    from deepspeed.runtime import engine as runtime

    choose = runtime.DeepSpeedEngine._do_optimizer_sanity_check

    def aligning(self, optimizer):
        chosen = choose(self, optimizer)
        return runtime.ZERO_OPTIMIZATION if chosen == runtime.BFLOAT16 else chosen

    with mock.patch.object(runtime.DeepSpeedEngine, "_do_optimizer_sanity_check", aligning):
        yield


def _autos(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _autos(item, f"{where}[{number}]")
    elif value == "auto":
        yield where

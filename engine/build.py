"""From a configuration to the objects of a run, with every check that needs no device."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import losses
import models
from engine import (
    compilation,
    config,
    config_paths,
    data_lines,
    deepspeed_engine,
    identity,
    optim,
    reference,
)
from engine.schedule import learning_rate
from loaders import caption_recipes, choices, source_names, texts, tokenizers, views
from loaders.arrays import ArrayShape
from loaders.batch import TextOptions, TripletDataset
from loaders.errors import ConfigError
from loaders.labels import LabelSpace
from loaders.manifest import ShardSet, open_shards
from loaders.one_source import OneSourceOrder
from loaders.order import Order, Source, plan_streams
from losses._method import Method
from models.config import ModelConfig


@dataclass
class Plan:
    """A run before any model exists: data, order, length, rates."""

    cfg: DictConfig
    world_size: int
    sources: list[ShardSet]
    labels: LabelSpace
    order: Order
    steps: int
    warmup: int
    rates: dict[str, float]
    deepspeed: dict[str, Any]
    method: type[Method]
    notes: tuple[str, ...] = ()  # what was decided and not asked for

    @property
    def mixes(self) -> bool:
        """Whether images and targets are blended in pairs."""
        return self.cfg.data.augmentation == choices.MIXED

    @property
    def micro_batch(self) -> int:
        """Samples per rank and micro-batch."""
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    def identity(self) -> dict[str, Any]:
        """What a continuation must have in common with this run."""
        cfg = OmegaConf.to_container(self.cfg, resolve=True)
        if cfg["data"]["templates"] not in texts.presets():  # a file, wherever it lies
            content = json.dumps(texts.load_templates(cfg["data"]["templates"]))
            cfg["data"]["templates"] = hashlib.sha256(content.encode()).hexdigest()
        # Tars whose lines are several captions are not the data that they were as one caption.
        lines = {True: ", a caption a line", False: ""}
        data = {s.name: s.fingerprint + lines[bool(s.caption_lines)] for s in self.sources}
        return identity.facts({**cfg, **reference.identity(cfg["model"])}, data)

    def rate(self, step: int) -> float:
        """Learning rate of the update number `step` (0-based)."""
        return rate(step, self.steps, self.warmup, self.rates, self.cfg.optim.schedule)

    def describe(self) -> str:
        """The plan in words, printed at the start and by --dry-run."""
        batch, train = self.cfg.train.global_batch, self.cfg.train
        lines = [
            f"run {self.cfg.name}: method {self.cfg.loss.get('name', 'unicl')}, "
            f"recipe {self.cfg.recipe}"
        ]
        for source in self.sources:
            classes = f", {len(source.classes)} classes" if source.classes else ""
            lines.append(
                f"  {source.kind} {source.name}: {len(source)} samples in "
                f"{len(source.shards)} shards{classes}"
                + data_lines.captions(source, self.cfg.data, len(self.method.texts))
            )
        lines += [
            *data_lines.named_views(self.cfg.data),
            f"  sampler {self.cfg.data.sampler}: {data_lines.shares(self.order, self.steps)}",
            f"  global batch {batch} = {self.world_size} ranks x {train.accumulation} "
            f"micro-batches x {self.micro_batch}",
            f"  {self.steps} steps ({self.warmup} warm-up), {self.steps * batch} samples, passes: "
            + ", ".join(f"{p:.2f}" for p in self.order.passes(self.steps)),
            f"  lr {self.rates['lr']:.2e}, {self.cfg.optim.schedule} to "
            f"{self.rates['min_lr']:.1e}, "
            f"weight decay {self.cfg.optim.weight_decay}, "
            f"gradient clipping {self.deepspeed['gradient_clipping'] or 'none'}",
            f"  DeepSpeed ZeRO-{deepspeed_engine.stage(self.deepspeed)}, "
            f"{str(deepspeed_engine.precision(self.deepspeed)).removeprefix('torch.')}",
        ]
        lines += [f"  {note}" for note in self.notes]
        if self.cfg.train.compile:
            lines.append(f"  {compilation.announcement()}")
        if self.warmup > self.steps:
            lines.append(
                f"  warning: the warm-up of {self.warmup} steps is longer than the run of "
                f"{self.steps}: its highest rate is {self.rate(self.steps - 1):.2e}, and it never "
                "decays; lower optim.warmup_*, or train longer"
            )
        return "\n".join(lines)


def rate(step: int, steps: int, warmup: int, rates: dict[str, float], schedule: str) -> float:
    """Learning rate of the update number `step` (0-based); `rates`: of `config.learning_rates`."""
    return learning_rate(step, steps, warmup, **rates, schedule=schedule)


def plan(cfg: DictConfig, world_size: int) -> Plan:
    """Open the data, fix the order, the length and the DeepSpeed configuration.

    Raises:
        ConfigError: contradictions in the configuration or the DeepSpeed file.
        DataError: data that is missing, broken, or too little for one batch.
    """
    file = deepspeed_engine.read_json(cfg.deepspeed)
    deepspeed = deepspeed_engine.resolve(file, cfg, world_size, cfg.deepspeed)
    notes = [f"{cfg.deepspeed}: {n}" for n in deepspeed_engine.additions(file, deepspeed)]
    method = losses.find(cfg.loss.get("name", "unicl"))
    micro_batch = deepspeed["train_micro_batch_size_per_gpu"]
    mixed = cfg.data.augmentation == choices.MIXED
    if (mixed or method.blends_neighbours) and micro_batch % 2:
        who = f"data.augmentation={choices.MIXED}" if mixed else f"loss.name={cfg.loss.name}"
        raise ConfigError(
            f"{who} blends samples in pairs, and a micro-batch of {micro_batch} leaves one over; "
            "change train.global_batch or train.accumulation"
        )
    sources = [
        _open(spec, kind)
        for kind in ("image_label", "image_text")
        for spec in config.specs(cfg.data[kind], f"data.{kind}")
    ]
    _check_sources(sources, cfg, method)
    notes += reference.settle(cfg, sources)
    views_of_order = [Source(s.name, s.kind, s.shard_sizes) for s in sources]
    ratios = OmegaConf.to_container(cfg.data.ratios) if cfg.data.ratios else None
    streams = plan_streams(views_of_order, cfg.data.sampler, ratios)
    kind = OneSourceOrder if cfg.data.sampler == "one_source" else Order
    order = kind(views_of_order, streams, cfg.train.global_batch, cfg.seed, cfg.data.block_shards)
    steps, warmup = config.count_steps(cfg, sum(len(source) for source in sources))
    return Plan(
        cfg=cfg,
        world_size=world_size,
        sources=sources,
        labels=LabelSpace(sources, merge=cfg.data.label_merge),
        order=order,
        steps=steps,
        warmup=warmup,
        rates=config.learning_rates(cfg),
        deepspeed=deepspeed,
        method=method,
        notes=tuple(notes),
    )


def dataset(plan: Plan) -> TripletDataset:
    """The map from (step, position, uid) to a training sample, tried once for each source.

    Raises:
        ConfigError: an augmentation, tokenizer or template list that cannot be built.
        DataError: a source of which none of several samples can be used, or a caption source that
            none of them has.
    """
    cfg, model = plan.cfg, model_config(plan.cfg)
    image, data = model.image, OmegaConf.to_container(cfg.data, resolve=True)
    names = plan.method.images
    recipes = choices.by_view("data.augmentation", data["augmentation"], names)
    source, captions = caption_recipes.read(data["caption"], plan.method.texts)
    made = TripletDataset(
        plan.sources,
        plan.labels,
        views=[views.build_train(name, image.size, image.mean, image.std) for name in recipes],
        texts=TextOptions(
            texts.load_templates(cfg.data.templates), source, len(plan.method.texts), captions
        ),
        tokenizer=tokenizers.build(model.text.tokenizer, model.text.context_length, image.size),
        seed=cfg.seed,
        caption_labels=cfg.data.caption_labels,
        decode=views.decoder(),
        arrays=_arrays(plan, model),
    )
    made.try_sources()
    return made


def engine(plan: Plan, device: torch.device):
    """Model, method and optimizer under DeepSpeed, the same initial weights at any world size."""
    cfg = plan.cfg
    torch.manual_seed(cfg.seed)
    model = models.build(model_config(cfg))
    if cfg.train.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if cfg.train.compile:
        compilation.compile_towers(model, deepspeed_engine.stage(plan.deepspeed), device)
    method = build_method(plan, model)
    method.precision = deepspeed_engine.precision(plan.deepspeed)
    optimizer = optim.build(model, method, cfg.optim, fused=device.type == "cuda")
    module = deepspeed_engine.TrainModule(model, method).to(device).train()
    return deepspeed_engine.initialise(module, optimizer, plan.deepspeed, device)


def describe_parts(plan: Plan) -> str:
    """Build dataset, model and method once, as a run would, and say how large they are.

    Raises:
        ConfigError: an augmentation, tokenizer, template list or tower that cannot be built.
        DataError: as `dataset`.
    """
    dataset(plan)
    model = models.build(model_config(plan.cfg))
    method = build_method(plan, model)
    counts = {**model.towers(), "model": model, "method": method}
    sizes = [
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
        for name, part in counts.items()
    ]
    return "  parameters: " + ", ".join(sizes)


def build_method(plan: Plan, model: nn.Module) -> Method:
    """The method with the sizes that its heads need."""
    settings = dict(OmegaConf.to_container(plan.cfg.loss, resolve=True))
    dims = {
        "embed_dim": model.embed_dim,
        "image_width": model.image_width,
        "text_width": model.text_width,
        "num_classes": plan.labels.num_classes,
        "vocab_size": model.cfg.text.vocab_size,
    }
    return losses.build(settings.pop("name", "unicl"), settings, dims)


def _arrays(plan: Plan, model: ModelConfig) -> list[ArrayShape]:
    """The arrays of each sample; `engine.config_rules` has seen that the model says their shape."""
    settings = dict(OmegaConf.to_container(plan.cfg.loss, resolve=True))
    settings.pop("name", None)
    options = losses.read_config(plan.method.Config, settings, "loss")
    shapes = {"objects": model.regions}
    needed = plan.method.needs(options)
    return [ArrayShape(name, shapes[name].count, shapes[name].width) for name in needed]


def model_config(cfg: DictConfig) -> ModelConfig:
    """The checked `model:` section."""
    return ModelConfig.from_dict(OmegaConf.to_container(cfg.model, resolve=True))


def _open(spec: str, kind: str) -> ShardSet:
    with config_paths.named(f"data.{kind}", spec):
        return open_shards(spec, kind=kind)


def _check_sources(sources: list[ShardSet], cfg: DictConfig, method: type[Method]) -> None:
    if not sources:
        raise ConfigError("no data: give data.image_label, data.image_text or both")
    source_names.distinguish(sources)
    kinds = {source.kind for source in sources}
    for needed, kind in ((method.needs_labels, "image_label"), (method.needs_pairs, "image_text")):
        if needed and kind not in kinds:
            raise ConfigError(f"loss.name={cfg.loss.name} needs data.{kind}")

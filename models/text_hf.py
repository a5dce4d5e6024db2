"""Text tower: any Hugging Face encoder, with the first token's state or the mean over tokens."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from loaders.errors import ConfigError
from models.config import TextConfig
from models.text_transformer import set_hf_grad_checkpointing

# Encoders that take a mask of (b, 1, L, L) as it is. Given one of (b, L), they first ask whether it
# masks anything (transformers, masking_utils), and every encoding would wait for the device.
_TAKE_WHOLE_MASKS = (
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet",
)  # fmt: skip


def _encoder_config(cfg: TextConfig) -> PretrainedConfig:
    try:
        if cfg.hf_config is not None:
            return AutoConfig.for_model(**cfg.hf_config)
        return AutoConfig.from_pretrained(cfg.hf_name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"hf_config {dict(cfg.hf_config)}" if cfg.hf_config else f"hf_name '{cfg.hf_name}'"
        raise ConfigError(
            f"model.text.{what} cannot be read: {error}. Give the name of a Hugging Face encoder, "
            "a folder with config.json, or a mapping with model_type."
        ) from error


def _encoder(cfg: TextConfig, config: PretrainedConfig) -> PreTrainedModel:
    if cfg.hf_name is None or not cfg.pretrained:
        return AutoModel.from_config(config)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # its carriage returns would fill the output of a job
    try:
        return AutoModel.from_pretrained(cfg.hf_name, config=config)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.text.hf_name '{cfg.hf_name}': weights cannot be loaded: {error}. "
            "Set model.text.pretrained: false to start from scratch."
        ) from error


class HuggingFaceTower(nn.Module):
    """A bidirectional encoder; padding is told from tokens by the encoder's padding id.

    `pooling: first` is what the UniCL release does for tokenizers other than CLIP's
    (microsoft/UniCL, model/model.py); the projection works on the encoder's hidden size.
    """

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        config = _encoder_config(cfg)
        if config.is_encoder_decoder:
            raise ConfigError(
                f"model.text: '{config.model_type}' is an encoder-decoder; give an encoder "
                "such as BERT, RoBERTa or MPNet"
            )
        if config.pad_token_id is None:
            raise ConfigError(
                f"model.text: the configuration of '{config.model_type}' has no pad_token_id, "
                "so padding cannot be masked; set it in its config.json or in hf_config"
            )
        self.pad_id = config.pad_token_id
        self.pooling = cfg.pooling
        self.width = config.hidden_size
        self.whole_mask = config.model_type in _TAKE_WHOLE_MASKS
        rates = [v for k, v in config.to_dict().items() if "dropout" in k or "drop_rate" in k]
        self.has_dropout = any(isinstance(rate, float | int) and rate > 0 for rate in rates)
        self.encoder = _encoder(cfg, config)
        # BERT-like models carry a tanh pooler that nothing here reads: it would never get a
        # gradient, which ZeRO and unused-parameter checks both complain about.
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids.

        Outside of training the batch is cut to its longest text first; in training
        `loaders.text_shapes` has cut it, so that nothing waits for the device here.

        Args:
            input_ids: (b, L) int64, padded on the right with the encoder's padding id.

        Returns:
            pooled state (b, width) and all states (b, L', width), L' <= L.
        """
        if not self.training:
            used = self.mask(input_ids).any(dim=0).nonzero()
            input_ids = input_ids[:, : int(used.max()) + 1 if len(used) else 1]
        mask = self.mask(input_ids)
        states = self.encoder(
            input_ids=input_ids, attention_mask=self._attention_mask(mask)
        ).last_hidden_state
        if self.pooling == "first":
            return states[:, 0], states
        weights = mask.unsqueeze(-1).float()
        mean = (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return mean.to(states.dtype), states

    def mask(self, input_ids: Tensor) -> Tensor:
        """(b, L) bool: what is not padding of each row, its end token included."""
        return input_ids != self.pad_id

    def _attention_mask(self, mask: Tensor) -> Tensor:
        """The mask (b, L) as the encoder takes it without looking at its values, if it can."""
        kind = self.encoder.config._attn_implementation
        if not self.whole_mask or kind not in ("sdpa", "eager"):
            return mask.long()
        whole = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        if kind == "sdpa":
            return whole
        dtype = self.encoder.dtype
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(whole, dtype=dtype).masked_fill(~whole, lowest)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass (in training mode)."""
        set_hf_grad_checkpointing(self.encoder, enable)

    def no_weight_decay(self) -> set[str]:
        """None beyond the usual rule for one-dimensional parameters."""
        return set()

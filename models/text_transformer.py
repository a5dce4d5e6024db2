"""UniCL's text tower: CLIP's causal transformer, pooled at the end-of-text token."""

from __future__ import annotations

import math

import torch
from timm.layers import LayerNormFp32
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPAttention

from models.config import TextConfig

# UniCL's own LayerNorm class uses this, CLIP 1e-5 (microsoft/UniCL, model/text_encoder).
LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02
CLIP_END_ID = 49407  # of the tokenizer `clip` (openai/CLIP, clip/simple_tokenizer.py)


def end_positions(input_ids: Tensor, end_id: int | None = None) -> Tensor:
    """Position of the end-of-text token of each row: where the text is pooled.

    Args:
        input_ids: (b, L) int64. Padding may be 0 (OpenAI's tokenizer) or the end token itself
            (Hugging Face's): argmax takes the first maximum, so both give the same position.
        end_id: counts as larger than every other id, so that a token added behind it (a mask) does
            not matter. Where it is unknown, or a row is without it, the largest id of the row is
            the end, as in CLIP's and UniCL's releases.

    Returns:
        (b,) int64.
    """
    if end_id is not None:
        input_ids = input_ids.masked_fill(input_ids == end_id, torch.iinfo(input_ids.dtype).max)
    return input_ids.argmax(dim=-1)


class TransformerTower(nn.Module):
    """Pre-norm causal transformer with QuickGELU, on the text modules of transformers' CLIP.

    LayerNorms compute in float32 whatever the weights' type. Source: microsoft/UniCL,
    model/text_encoder/transformer.py (12 layers, width 512, 8 heads, context 77).
    """

    has_dropout = False

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.width = cfg.width
        self.end_id = CLIP_END_ID if cfg.tokenizer == "clip" else None
        last = cfg.vocab_size - 1
        # A larger vocabulary has ids of its own behind CLIP's end (a mask). Only exports read it.
        end = last if self.end_id is None else min(last, self.end_id)
        self.encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=cfg.vocab_size,
                hidden_size=cfg.width,
                intermediate_size=4 * cfg.width,
                num_hidden_layers=cfg.layers,
                num_attention_heads=cfg.heads,
                max_position_embeddings=cfg.context_length,
                hidden_act="quick_gelu",
                layer_norm_eps=LAYER_NORM_EPS,
                attention_dropout=0.0,
                pad_token_id=0,
                bos_token_id=end - 1,
                eos_token_id=end,
            )
        )
        self._replace_layer_norms()
        self.reset_parameters()

    def _replace_layer_norms(self) -> None:
        for module in list(self.encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(module, name, LayerNormFp32(self.width, eps=LAYER_NORM_EPS))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the UniCL release does.

        Truncated normal with standard deviation 0.02 for embeddings, positions and linear
        weights, zero biases. The release keeps PyTorch's xavier default for the fused (3w, w)
        attention in-projection, i.e. uniform within sqrt(6 / (3w + w)); the separate (w, w) query,
        key and value matrices here get that same bound instead of their own sqrt(6 / 2w).
        """
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        bound = math.sqrt(6 / (4 * self.width))
        for module in self.encoder.modules():
            if isinstance(module, CLIPAttention):
                for projection in (module.q_proj, module.k_proj, module.v_proj):
                    nn.init.uniform_(projection.weight, -bound, bound)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids.

        Outside of training the batch is cut after its last end-of-text token first. That changes
        nothing: under the causal mask no state depends on later positions, and later states are
        not pooled. In training `loaders.text_shapes` has cut it, so that nothing waits for the
        device here.

        Args:
            input_ids: (b, L) int64 with L at most the context length.

        Returns:
            state at the end-of-text token (b, width) and all states (b, L', width), L' <= L,
            both after the final LayerNorm.
        """
        ends = end_positions(input_ids, self.end_id)
        if not self.training:
            input_ids = input_ids[:, : int(ends.max()) + 1]
        # No attention mask: padding follows the end token, where the causal mask hides it.
        states = self.encoder(input_ids=input_ids).last_hidden_state
        return states[torch.arange(len(ends), device=ends.device), ends], states

    def mask(self, input_ids: Tensor) -> Tensor:
        """(b, L) bool: the text of each row, up to and with its end token."""
        ends = end_positions(input_ids, self.end_id)
        return torch.arange(input_ids.shape[1], device=ends.device) <= ends[:, None]

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass (in training mode)."""
        set_hf_grad_checkpointing(self.encoder, enable)

    def no_weight_decay(self) -> set[str]:
        """None: see `TwoTower.no_weight_decay` for what the release does with these names."""
        return set()


def set_hf_grad_checkpointing(encoder: nn.Module, enable: bool) -> None:
    """Switch gradient checkpointing of a transformers model, without re-entrant backward."""
    if enable:
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        encoder.gradient_checkpointing_disable()

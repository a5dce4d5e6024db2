"""Plain-torch references, written from the definitions and sharing no code with `models`.

Their parameter names are those of the official release, so their state dicts stand in for its
checkpoints. Swin follows Liu et al. 2021 (arXiv 2103.14030), section 3 and equation 4.
"""

import torch
from torch import nn
from torch.nn import functional as F

WINDOW = 7


class ReferenceBlock(nn.Module):
    """Pre-norm block of CLIP: fused multi-head attention, then a QuickGELU MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=1e-12)
        self.ln_2 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=future, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class ReferenceText(nn.Module):
    """UniCL's text encoder: always the full context, no cutting."""

    def __init__(self, vocab_size, context_length, width, layers, heads):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width))
        self.resblocks = nn.ModuleList(ReferenceBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, eps=1e-12)

    def forward(self, input_ids):
        x = self.token_embedding(input_ids) + self.positional_embedding
        for block in self.resblocks:
            x = block(x)
        x = self.ln_final(x)
        ends = [row.tolist().index(max(row.tolist())) for row in input_ids]
        return torch.stack([states[end] for states, end in zip(x, ends, strict=True)])


class ReferenceAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        place = [(row, column) for row in range(WINDOW) for column in range(WINDOW)]
        index = [
            [(a - c + WINDOW - 1) * (2 * WINDOW - 1) + (b - d + WINDOW - 1) for c, d in place]
            for a, b in place
        ]
        self.register_buffer("relative_position_index", torch.tensor(index))

    def forward(self, x, allowed):
        """x: (b, 49, dim); allowed: (49, 49), which positions may see each other."""
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        logits = q @ k.transpose(-1, -2) / (dim // self.heads) ** 0.5 + bias
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, dim))


class ReferenceSwinBlock(nn.Module):
    def __init__(self, dim, heads, side, shift):
        super().__init__()
        self.shift = shift if side > WINDOW else 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ReferenceAttention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        # The release stores this buffer (its content is not read here).
        mask = torch.zeros((side // WINDOW) ** 2, WINDOW**2, WINDOW**2) if self.shift else None
        self.register_buffer("attn_mask", mask)

    def windows_attention(self, x):
        """x: (b, side, side, dim), one window after the other."""
        side = x.shape[1]
        # After the cyclic shift a window may hold pixels from opposite borders: only those of the
        # same region (0 inner, 1 last whole part, 2 wrapped) see each other.
        line = torch.zeros(side, dtype=torch.long)
        if self.shift:
            line[-WINDOW:], line[-self.shift :] = 1, 2
        region = 3 * line[:, None] + line[None, :]
        x = x.roll((-self.shift, -self.shift), (1, 2))
        out = torch.empty_like(x)
        for top in range(0, side, WINDOW):
            for left in range(0, side, WINDOW):
                here = (slice(top, top + WINDOW), slice(left, left + WINDOW))
                label = region[here].flatten()
                patch = x[:, here[0], here[1]]
                seen = self.attn(patch.flatten(1, 2), label[:, None] == label[None, :])
                out[:, here[0], here[1]] = seen.view_as(patch)
        return out.roll((self.shift, self.shift), (1, 2))

    def forward(self, x):
        x = x + self.windows_attention(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ReferenceMerging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class ReferenceStage(nn.Module):
    def __init__(self, dim, heads, depth, side, last):
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                ReferenceSwinBlock(dim, heads, side, index % 2 * (WINDOW // 2))
                for index in range(depth)
            )
        )
        self.downsample = None if last else ReferenceMerging(dim)

    def forward(self, x):
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class ReferenceSwinTiny(nn.Module):
    """Swin-T at 224 pixels under the original names; final norm, then the mean over tokens."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, 96, kernel_size=4, stride=4), "norm": nn.LayerNorm(96)}
        )
        depths, heads = (2, 2, 6, 2), (3, 6, 12, 24)
        self.layers = nn.Sequential(
            *(
                ReferenceStage(96 * 2**i, heads[i], depths[i], 56 // 2**i, last=i == 3)
                for i in range(4)
            )
        )
        self.norm = nn.LayerNorm(768)

    def forward(self, images):
        x = self.patch_embed["proj"](images).permute(0, 2, 3, 1)
        x = self.layers(self.patch_embed["norm"](x))
        return self.norm(x).mean(dim=(1, 2))


class ReferenceUniCL(nn.Module):
    """The release's model: projections multiply from the right, the temperature is 0-D."""

    def __init__(self, text, embed_dim):
        super().__init__()
        self.image_encoder = ReferenceSwinTiny()
        self.text_encoder = ReferenceText(**text)
        self.image_projection = nn.Parameter(0.1 * torch.randn(768, embed_dim))
        self.text_projection = nn.Parameter(0.1 * torch.randn(text["width"], embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(3.25))

    def encode_image(self, images):
        x = self.image_encoder(images) @ self.image_projection
        return x / x.norm(dim=-1, keepdim=True)

    def encode_text(self, input_ids):
        x = self.text_encoder(input_ids) @ self.text_projection
        return x / x.norm(dim=-1, keepdim=True)


def random_captions(count, context_length, vocab_size, pad_id, generator):
    """(count, context_length) ids: start, words, end (the largest id), padding; mixed lengths."""
    start, end = vocab_size - 2, vocab_size - 1
    ids = torch.full((count, context_length), pad_id)
    for row in range(count):
        words = int(torch.randint(1, context_length // 2, (1,), generator=generator))
        ids[row, 0] = start
        ids[row, 1 : words + 1] = torch.randint(1, start, (words,), generator=generator)
        ids[row, words + 1] = end
    return ids

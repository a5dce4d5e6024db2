"""Text to token ids: CLIP's byte-pair encoding from a shipped file, or a Hugging Face tokenizer.

Or to a picture: `loaders.render`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from loaders.errors import ConfigError
from loaders.render import Renderer

BPE_FILE = Path(__file__).parent / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SIZE = 49408
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
# OpenAI's padding. Id 0 is also the token "!", but padding follows the end token, where a causal
# encoder does not look and pooling at the largest id does not reach.
CLIP_PAD_ID = 0
# Part of the digest: raise it when `clean_clip_text` changes.
CLEANING_VERSION = "clip-clean-1"
# Far more than the tokens of any text tower. Cleaning a text made for it takes time with the square
# and cube of its length: "&amp;amp;…" of 5,000 characters 1.5 s, of 20,000 38 s (ftfy 6.3).
MAX_CHARACTERS = 4096


def clean_clip_text(text: str) -> str:
    """Clean a caption as CLIP does: mend encoding, HTML entities (twice), white space, case.

    Source: openai/CLIP, clip/simple_tokenizer.py. With it the ids equal those of open_clip's
    tokenizer, but for characters whose letter class differs between the two libraries' Unicode
    versions, and the long s after an apostrophe, which open_clip reads as the suffix 's.
    """
    # Nothing to mend in printable ASCII without an HTML entity: most captions, ten times faster.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Callable from texts to a matrix of ids, padded and cut to `context_length`.

    Attributes:
        vocab_size: number of ids, special tokens included.
        start_id, end_id, pad_id: ids of the first token, the last token and the padding.
        context_length: columns of the result.
        digest: SHA-256 over everything that decides the ids, for checkpoints and result rows.
    """

    def __init__(
        self,
        backend: PreTrainedTokenizerBase,
        context_length: int,
        *,
        start_id: int,
        end_id: int,
        pad_id: int,
        clean: Callable[[str], str] | None,
        identity: bytes,
        rebuild: Callable[[], Tokenizer],
    ) -> None:
        self._backend = backend
        self._clean = clean
        self._rebuild = rebuild
        self.context_length = context_length
        self.vocab_size = len(backend)
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        settings = f"{context_length} {pad_id}".encode()
        self.digest = hashlib.sha256(identity + b"\0" + settings).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokenize a list of texts.

        A text that is too long is cut so that the end token stays in the last column. The names
        of special tokens inside a caption are read as ordinary text. What follows MAX_CHARACTERS
        is not looked at.

        Returns:
            (n, context_length) int64.

        Raises:
            TypeError: `texts` is one string, or holds something that is not a string.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"expected a list of strings, got {texts!r:.100}")
        ids = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.int64)
        if len(texts) == 0:
            return ids
        texts = [text[:MAX_CHARACTERS] for text in texts]
        cleaned = [self._clean(text) for text in texts] if self._clean else texts
        rows = self._backend(
            cleaned,
            truncation=True,
            max_length=self.context_length,
            split_special_tokens=True,
            return_attention_mask=False,
        )["input_ids"]
        matrix = ids.numpy()
        for row, tokens in enumerate(rows):
            matrix[row, : len(tokens)] = tokens
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes build their own: the Rust backend does not travel with all its settings.
        return (self._rebuild, ())


def _clip_vocabulary(lines: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id and the ordered merges, from the lines of CLIP's merge file.

    The printable bytes come first, then the others mapped to characters from 256 on, then the
    same 256 as word ends, the merged pairs in order, and the two special tokens.
    Source: openai/CLIP, clip/simple_tokenizer.py.
    """
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable]
    characters += [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += [first + second for first, second in merges] + [START_TOKEN, END_TOKEN]
    return {token: index for index, token in enumerate(tokens)}, merges


@functools.cache  # a quarter of a second, and nothing in it depends on the caller
def _clip_backend() -> tuple[CLIPTokenizer, bytes]:
    """transformers' tokenizer of CLIP's vocabulary, and the bytes of the merge file."""
    packed = BPE_FILE.read_bytes()
    # The first line is a version comment; the file holds far more merges than CLIP's vocabulary
    # of 49,408 = 2 * 256 bytes + merges + 2 special tokens has room for.
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : CLIP_VOCAB_SIZE - 512 - 2 + 1]
    vocabulary, merges = _clip_vocabulary(lines)
    # `vocab=` and `merges=` on purpose: transformers accepts `vocab_file=` without a word and
    # then builds a tokenizer of two entries.
    backend = CLIPTokenizer(vocab=vocabulary, merges=merges)
    if len(backend) != CLIP_VOCAB_SIZE:
        raise ConfigError(f"{BPE_FILE}: {len(backend)} tokens instead of {CLIP_VOCAB_SIZE}")
    # transformers would compose Unicode characters once more, after `clean_clip_text`; CLIP does
    # not, and "<b>e&#769;" (a text where ftfy leaves entities alone) would get other ids.
    backend.backend_tokenizer.normalizer = None
    return backend, packed


def _build_clip(context_length: int) -> Tokenizer:
    backend, packed = _clip_backend()
    return Tokenizer(
        backend,
        context_length,
        start_id=backend.convert_tokens_to_ids(START_TOKEN),
        end_id=backend.convert_tokens_to_ids(END_TOKEN),
        pad_id=CLIP_PAD_ID,
        clean=clean_clip_text,
        identity=packed + CLEANING_VERSION.encode(),
        rebuild=functools.partial(build, "clip", context_length),
    )


def _first_id(backend: PreTrainedTokenizerBase, name: str, *attributes: str) -> int:
    for attribute in attributes:
        value = getattr(backend, attribute)
        if value is not None:
            return value
    raise ConfigError(f"tokenizer '{name}' has none of {attributes}; choose one of an encoder")


def _build_hugging_face(name: str, context_length: int) -> Tokenizer:
    try:
        backend = AutoTokenizer.from_pretrained(name, padding_side="right", truncation_side="right")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer '{name}' is neither 'clip' nor a Hugging Face name or folder that can be "
            f"read: {error}"
        ) from error
    if not backend.is_fast:
        raise ConfigError(f"tokenizer '{name}' has no fast version (tokenizer.json)")
    return Tokenizer(
        backend,
        context_length,
        start_id=_first_id(backend, name, "cls_token_id", "bos_token_id"),
        end_id=_first_id(backend, name, "sep_token_id", "eos_token_id"),
        pad_id=_first_id(backend, name, "pad_token_id"),
        clean=None,
        identity=backend.backend_tokenizer.to_str().encode(),
        rebuild=functools.partial(build, name, context_length),
    )


def build(
    name: str = "clip", context_length: int = 77, image_size: int = 224
) -> Tokenizer | Renderer:
    """Build a tokenizer.

    Args:
        name: `clip` for CLIP's byte-pair encoding (offline; start 49406, end 49407, padding 0),
            `rendered` for texts drawn as pictures, anything else is a Hugging Face name or folder.
        context_length: columns of the result; longer texts are cut. Not of pictures.
        image_size: side of the pictures in pixels.

    Raises:
        ConfigError: the name cannot be read, the tokenizer lacks a start, end or padding token, or
            the pictures are too small.
    """
    if name == "rendered":
        return Renderer(image_size)
    if context_length < 2:
        raise ConfigError(
            f"context_length must be at least 2 (start and end), got {context_length}"
        )
    return (
        _build_clip(context_length) if name == "clip" else _build_hugging_face(name, context_length)
    )

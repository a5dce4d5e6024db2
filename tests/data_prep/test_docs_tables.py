"""The two scripts of docs/data.md that make tables, run as they stand there with random models."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from data_prep import annotate
from tests.data_prep.test_reshard import TOTAL, contents, make_set

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "cat", "dog", "=>"]


def script(name, folder):
    """The script that docs/data.md introduces by its name, as a file."""
    text = (ROOT / "docs/data.md").read_text()
    code = re.search(rf"^`{name}`.*?^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (folder / name).write_text(code[1])
    return folder / name


def language_model(folder):
    """A GPT-2 of one layer with a vocabulary of eleven words."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)


def captioning_model(folder):
    """A BLIP of one layer on images of 16 pixels."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(
        folder
    )
    layer = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"vocab_size": len(WORDS), "hidden_size": 16, "encoder_hidden_size": 16, **layer}
    text |= {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {"hidden_size": 16, "image_size": 16, "patch_size": 8, **layer}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)


def run(name, model, place, folder):
    """The table that a script writes."""
    out = folder / f"{name}.jsonl"
    done = subprocess.run(
        [sys.executable, script(name, folder), model, place, out], text=True, capture_output=True,
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("name", "make", "field", "options"),
    [
        ("captions.py", captioning_model, "synthetic", []),
        pytest.param(
            *("rewrites.py", language_model, "rewrites", ["--lines", "rewrites=4"]),
            marks=pytest.mark.soak,
        ),
    ],
)
def test_the_table_of_a_local_model_can_be_joined(
    tmp_path, monkeypatch, name, make, field, options
):
    torch.manual_seed(0)
    make(tmp_path / "model")
    place = make_set(tmp_path / "toy", "toy")
    table = run(name, tmp_path / "model", place, tmp_path)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    captioned = [key for key, parts in contents(place).items() if "txt" in parts]
    assert [row["key"] for row in rows] == (
        captioned if name == "rewrites.py" else list(contents(place))
    )
    words = ["annotate.py", place, "--table", table, "--columns", f"{field}={field}", *options]
    words += ["--max-unmatched", "0.5", "--out", tmp_path / "new"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    annotate.main()
    found = [json.loads(parts.get("json", b"{}")) for parts in contents(tmp_path / "new").values()]
    joined = [about[field] for about in found if field in about]
    assert len(found) == TOTAL
    assert joined == [row[field] for row in rows if row[field]]
    assert len(joined) > TOTAL / 2

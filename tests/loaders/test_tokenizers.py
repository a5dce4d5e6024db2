import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast

from loaders import tokenizers
from loaders.errors import ConfigError

FIXTURE = Path(__file__).parent / "fixtures" / "clip_token_ids.json"
ROWS = json.loads(FIXTURE.read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def clip():
    return tokenizers.build("clip")


def test_merge_file_is_the_stated_one():
    readme = (tokenizers.BPE_FILE.parent / "README.md").read_text()
    assert hashlib.sha256(tokenizers.BPE_FILE.read_bytes()).hexdigest() in readme


@pytest.mark.parametrize("row", ROWS, ids=[ascii(row["text"])[:30] for row in ROWS])
def test_ids_are_those_of_open_clip(clip, row):
    ids = clip([row["text"]])
    assert ids.shape == (1, 77)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == row["ids"] + [0] * (77 - len(row["ids"]))


def test_batch_equals_single_texts(clip):
    texts = [row["text"] for row in ROWS]
    assert torch.equal(clip(texts), torch.cat([clip([text]) for text in texts]))


def test_attributes(clip):
    assert (clip.vocab_size, clip.context_length) == (49408, 77)
    assert (clip.start_id, clip.end_id, clip.pad_id) == (49406, 49407, 0)
    assert clip.end_id == clip.vocab_size - 1  # pooling looks for the largest id
    assert len(clip.digest) == 64
    assert clip.digest == tokenizers.build("clip").digest
    assert clip.digest != tokenizers.build("clip", 32).digest


def test_cut_text_keeps_the_end_token():
    ids = tokenizers.build("clip", context_length=8)(["one two three four five six seven eight"])
    assert ids.shape == (1, 8)
    assert (ids[0, 0], ids[0, -1]) == (49406, 49407)
    assert ids.argmax(dim=1).tolist() == [7]


def test_pooling_position_is_the_only_largest_id(clip):
    ids = clip(["a <|endoftext|> in the middle", "!"])
    assert (ids == clip.end_id).sum(dim=1).tolist() == [1, 1]


def test_empty_list_and_wrong_input(clip):
    assert clip([]).shape == (0, 77)
    with pytest.raises(TypeError, match="list of strings"):
        clip("a single string")
    with pytest.raises(TypeError, match="list of strings"):
        clip(["a", None])


def test_travels_to_worker_processes(clip):
    copy = pickle.loads(pickle.dumps(clip))
    texts = ["e&#769; caf\u00e9", "a dog"]
    assert torch.equal(copy(texts), clip(texts))
    assert copy.digest == clip.digest


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "##s"]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(
        folder
    )
    return str(folder)


def test_hugging_face_folder(bert_folder):
    bert = tokenizers.build(bert_folder, context_length=7)
    assert (bert.start_id, bert.end_id, bert.pad_id, bert.vocab_size) == (2, 3, 0, 10)
    assert bert(["A photo of dogs", "dog", "a a a a a a a a"]).tolist() == [
        [2, 5, 6, 7, 8, 9, 3],
        [2, 8, 3, 0, 0, 0, 0],
        [2, 5, 5, 5, 5, 5, 3],
    ]
    assert pickle.loads(pickle.dumps(bert))(["dog"]).tolist() == [[2, 8, 3, 0, 0, 0, 0]]
    assert bert.digest != tokenizers.build("clip", 7).digest


def test_unreadable_names():
    with pytest.raises(ConfigError, match="/no/such/folder"):
        tokenizers.build("/no/such/folder")
    with pytest.raises(ConfigError, match="at least 2"):
        tokenizers.build("clip", context_length=1)

import subprocess
import sys

import pytest

import models
from loaders.errors import ConfigError
from models.config import ModelConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imag": {}}, r"'model\.imag': did you mean 'image'"),
        ({"image": {"sise": 32}}, r"'model\.image\.sise': did you mean 'size'"),
        ({"text": {"widht": 32}}, r"'model\.text\.widht': did you mean 'width'"),
        ({"zzz": 1}, r"'model\.zzz': known keys: \['image', 'text'"),
        ({"augmentation": {"widht": 3}}, r"'model\.augmentation\.widht': did you mean 'width'"),
        ({"augmentation": {"width": 0}}, r"model\.augmentation\.width must be a positive integer"),
        ({"augmentation": True}, r"model\.augmentation: expected a mapping"),
        ({"image": "swin_tiny"}, r"model\.image: expected a mapping"),
        ({"image": {"size": 0}}, r"model\.image\.size must be a positive integer"),
        ({"image": {"mean": [0.5]}}, r"model\.image\.mean needs three numbers"),
        ({"text": {"name": "lstm"}}, r"model\.text\.name must be one of"),
        ({"text": {"width": 30, "heads": 4}}, r"width \(30\) must be divisible by heads \(4\)"),
        ({"text": {"pooling": "max"}}, r"model\.text\.pooling must be one of"),
        ({"text": {"name": "hf"}}, "exactly one of hf_name and hf_config"),
        ({"text": {"hf_name": "bert"}}, "need name: hf"),
        ({"logit_scale_max": -1.0}, r"model\.logit_scale_max must be positive"),
        ({"logit_scale_min": 0.0}, r"model\.logit_scale_min must be positive"),
        ({"similarity": "late"}, r"similarity=late needs model\.token_dim"),
        ({"token_dim": 256}, r"token_dim=256 belongs to model\.similarity=late"),
        ({"similarity": "late", "token_dim": 0}, r"model\.token_dim must be a positive integer"),
        (
            {
                "kind": "one_tower",
                "text": {"name": "pixels", "tokenizer": "rendered"},
                "similarity": "late",
                "token_dim": 8,
            },
            "model.kind=one_tower use similarity: cosine",
        ),
        ({"similarity": "dot"}, r"model\.similarity must be one of \('cosine', 'late'\)"),
        (
            {"logit_scale_min": 9.0, "logit_scale_max": 3.0},
            r"logit_scale_min=9\.0 must be less than logit_scale_max=3\.0",
        ),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)


def test_defaults_are_the_release():
    cfg = ModelConfig.from_dict({})
    assert (cfg.image.name, cfg.image.size, cfg.embed_dim) == ("swin_tiny", 224, 512)
    assert (cfg.text.width, cfg.text.layers, cfg.text.heads) == (512, 12, 8)
    assert (cfg.text.context_length, cfg.text.vocab_size) == (77, 49408)
    assert (cfg.logit_scale_init, cfg.logit_scale_max) == (1.0, None)


def test_without_pretrained_drops_starting_weights_only():
    cfg = ModelConfig.from_dict(
        {
            "image": {"kwargs": {"pretrained": True, "drop_path_rate": 0.1}},
            "text": {"name": "hf", "hf_name": "some/encoder"},
        }
    ).without_pretrained()
    assert cfg.image.kwargs == {"drop_path_rate": 0.1}
    assert not cfg.text.pretrained
    assert cfg.text.hf_name == "some/encoder"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"name": "swin_tinny"}, "'swin_tinny' is neither one of our presets"),
        ({"name": "resnet18", "kwargs": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"name": "resnet18", "kwargs": {"img_size": 9}}, r"set model\.image\.size instead"),
        ({"name": "resnet18", "size": 32, "kwargs": {"global_pool": ""}}, "without pooling"),
        ({"name": "levit_128s", "size": 100}, "100"),
    ],
)
def test_wrong_image_towers_are_named(image, message):
    with pytest.raises(ConfigError, match=message):
        models.build({"image": image})


def test_importing_the_package_is_light():
    code = "import sys, models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

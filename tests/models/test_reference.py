"""The model kind `reference`: lookup, module, and the folder that both need."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

import models
from loaders.errors import ConfigError, DataError
from models import reference_folder, retrieval
from models.config import ModelConfig, ReferenceConfig
from models.reference import Enrichment
from models.retrieval import Retrieval, nearest
from tests.engine import tiny
from tests.losses.test_no_waiting import NoOperatorWaits, NoTensorIsRead
from tests.models import reference_folders

# A worked example, by hand: identity projections, one head, both gates 1.
V = torch.tensor([[1.0, 0.0]])
U = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
W = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, -0.6]])
WORKED = {
    1: ([[0]], (0.8944271910, 0.4472135955)),
    2: ([[0, 1]], (0.9269246470, 0.3752475168)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Path and checksum of a reference folder of nine pairs."""
    return reference_folders.make(tmp_path_factory.mktemp("reference") / "folder")


def build(made, kind="reference", **settings):
    """A tiny model in training mode; of the kind `two_tower` without the reference."""
    torch.manual_seed(3)
    section = {"folder": made[0], "neighbours": 3, "heads": 2, **settings}
    return models.build({**tiny.MODEL, "kind": kind, "reference": section}).train()


def batch(size=4):
    content = tiny.make_batch(0, size)
    return content["image"][:, 0], content["text"][:, 0]


def module(width=8, image=5, text=6, heads=2):
    """A module with open gates, in float64."""
    torch.manual_seed(1)
    made = Enrichment(width, image, text, heads).double()
    nn.init.constant_(made.image.gate, 0.7)
    nn.init.constant_(made.text.gate, -1.3)
    return made


def pairs(samples=4, neighbours=6, width=8, image=5, text=6):
    """Features (b, W), u (b, K, d_u) and w (b, K, d_w), float64."""
    generator = torch.Generator().manual_seed(2)
    shapes = (samples, width), (samples, neighbours, image), (samples, neighbours, text)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("count", WORKED)
def test_worked_example(count):
    made = Enrichment(2, 2, 2, heads=1)
    for part in made.modules():
        if isinstance(part, nn.Linear):
            nn.init.eye_(part.weight)
    for part in (made.image, made.text):
        nn.init.ones_(part.gate)
    indices, expected = WORKED[count]
    found = nearest(V, U, count)
    assert found.tolist() == indices
    feature = F.normalize(made(V, U[found], W[found]), dim=-1)
    torch.testing.assert_close(feature, torch.tensor([expected]), rtol=0, atol=1e-6)


def test_module_is_torchs_multihead_attention():
    made, inputs = module(), pairs()
    features, image, text = inputs
    expected = features
    for part, values in ((made.image, image), (made.text, text)):
        torchs = nn.MultiheadAttention(
            8, 2, bias=False, kdim=5, vdim=values.shape[-1], batch_first=True
        ).double()
        weights = {
            "q_proj_weight": part.query.weight,
            "k_proj_weight": made.keys.weight,
            "v_proj_weight": part.value.weight,
            "out_proj.weight": part.out.weight,
        }
        found = torch.func.functional_call(torchs, weights, (features[:, None], image, values))[0]
        expected = expected + part.gate * found[:, 0]
    ours = made(*inputs)
    torch.testing.assert_close(ours, expected)
    ends = [torch.randn(ours.shape, dtype=torch.float64)] * 2
    gradients = (
        torch.autograd.grad((out * end).sum(), list(made.parameters()))
        for out, end in zip((ours, expected), ends, strict=True)
    )
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)
        assert got.abs().max() > 1e-3


def test_order_of_neighbours_and_copies_of_one_change_nothing():
    made, (features, image, text) = module(), pairs()
    turned = torch.tensor([4, 0, 5, 2, 1, 3])
    ours = made(features, image, text)
    torch.testing.assert_close(made(features, image[:, turned], text[:, turned]), ours)
    one = made(features, image[:, :1], text[:, :1])
    copies = (part[:, :1].expand(-1, 5, -1) for part in (image, text))
    torch.testing.assert_close(made(features, *copies), one)
    assert (ours - one).abs().max() > 0.1


def test_one_neighbour_has_the_weight_1():
    made, (features, image, text) = module(), pairs(neighbours=1)
    added = [
        part.gate * values[:, 0] @ part.value.weight.T @ part.out.weight.T
        for part, values in ((made.image, image), (made.text, text))
    ]
    torch.testing.assert_close(made(features, image, text), features + sum(added))


@pytest.mark.parametrize("scores", [2**24, 64, 1])
def test_nearest_is_brute_force_with_ties_by_the_smaller_index(scores, monkeypatch):
    """Of small whole numbers every inner product is exact, and most of them are equal."""
    monkeypatch.setattr(retrieval, "SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (61, 4), generator=generator).half()
    queries = torch.randint(-2, 3, (9, 4), generator=generator).float()
    dots = (queries.double() @ rows.double().T).tolist()
    for count in (1, 7, 61):
        expected = [sorted(range(61), key=lambda r: (-row[r], r))[:count] for row in dots]
        assert nearest(queries, rows, count).tolist() == expected


def test_nearest_does_not_depend_on_lengths():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(200, 16, generator=generator)
    queries = torch.randn(20, 16, generator=generator)
    lengths = torch.rand(200, 1, generator=generator) + 0.5
    found = nearest(queries, F.normalize(rows, dim=-1), 10)
    assert torch.equal(nearest(4 * queries, F.normalize(rows * lengths, dim=-1), 10), found)


def test_closed_gates_are_clip_with_the_same_gradients(folder):
    ours = build(folder)
    torch.manual_seed(3)
    clip = models.build(tiny.MODEL).train()
    values, shared = {}, dict(clip.named_parameters())
    for name, model in (("ours", ours), ("clip", clip)):
        image, text, scale = model(*batch())
        labels = torch.arange(4)
        loss = F.cross_entropy(scale * image @ text.T, labels)
        loss = loss + F.cross_entropy(scale * text @ image.T, labels)
        loss.backward()
        values[name] = loss
    assert values["ours"].equal(values["clip"])
    for name, parameter in ours.named_parameters():
        if name in shared:
            assert parameter.grad.equal(shared[name].grad), name
        elif name.endswith("gate"):
            assert parameter.grad.abs().min() > 0
        else:
            assert parameter.grad.count_nonzero() == 0
    assert shared.keys() < dict(ours.named_parameters()).keys()


def test_the_frozen_encoder_stays_as_it_is_and_out_of_the_model(folder):
    model = build(folder)
    frozen = model.retrieval.encoder
    before = copy.deepcopy(frozen.state_dict())
    names = [*model.state_dict(), *(name for name, _ in model.named_modules())]
    assert not any("retrieval" in name or "encoder.trunk" in name for name in names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        image, text, scale = model.train()(*batch())
        F.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()
        optimizer.step()
    assert not any(part.training for part in frozen.modules())
    assert all(before[name].equal(value) for name, value in frozen.state_dict().items())
    assert model.enrichment.image.gate.abs() > 0.01
    assert copy.deepcopy(model).retrieval is model.retrieval  # a teacher's, say


@pytest.mark.parametrize("size", [32, 48])
@torch.no_grad()
def test_queries_are_of_the_encoders_own_statistics_and_size(folder, size):
    found = reference_folder.find(ReferenceConfig(folder[0], 1))
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tower, cfg = found.encoder()
    resized = v2.functional.resize(pixels, [cfg.size], v2.InterpolationMode.BICUBIC, antialias=True)
    expected = F.normalize(tower(v2.functional.normalize(resized, cfg.mean, cfg.std))[0], dim=-1)
    ours = Retrieval(found, 1, mean, std).queries(v2.functional.normalize(pixels, mean, std))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_model_adds_what_is_nearest_to_its_image(folder):
    model = build(folder).eval()
    for part in (model.enrichment.image, model.enrichment.text):
        nn.init.ones_(part.gate)
    images, _ = batch()
    found = reference_folder.find(model.cfg.reference)
    image, text = (features.float() for features in found.features())
    best = (model.retrieval.queries(images) @ image.T).topk(3).indices
    own = model.image(images)[0]
    pooled = model.enrichment(own, image[best], text[best])
    out = model.encode_image(images)
    torch.testing.assert_close(out["pooled"], pooled)
    torch.testing.assert_close(out["feature"], F.normalize(model.image_projection(pooled), dim=-1))
    assert (out["pooled"] - own).abs().max() > 0.1


def test_bfloat16_finds_and_adds_what_float32_does(folder):
    model = build(folder)
    images, _ = batch()
    whole = model.retrieval.queries(images)
    torch.testing.assert_close(model.retrieval.queries(images.bfloat16()), whole, rtol=0, atol=0.02)
    assert {p.dtype for p in model.retrieval.encoder.parameters()} == {torch.float32}
    made, inputs = module(), pairs()
    half = made.bfloat16()(inputs[0].bfloat16(), *(part.half() for part in inputs[1:]))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), module()(*inputs), rtol=0.05, atol=0.05)


def test_nothing_waits_for_the_device(folder):
    model = build(folder)
    images = batch()[0]
    own = torch.randn(4, model.image_width, requires_grad=True)
    with NoOperatorWaits(), NoTensorIsRead():
        model.enrichment(own, *model.retrieval(images)).sum().backward()
    assert own.grad is not None


def test_what_the_model_says_of_its_reference(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder[0])
    model = build(("link", None))
    assert model.cfg.reference.checksum == folder[1]
    assert model.cfg.reference.folder == str(tmp_path / "link")
    again = ModelConfig.from_dict(dataclasses.asdict(model.cfg))
    assert again == model.cfg


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"checksum": "0" * 64}, DataError, r"the model was trained with the reference 0{64}"),
        ({"neighbours": 10}, ConfigError, r"neighbours=10: .* holds 9 samples"),
        ({"neighbours": 0}, ConfigError, r"neighbours must be a positive integer"),
        ({"heads": 5}, ConfigError, r"heads=5 does not divide the image tower's width 32"),
        ({"folder": "nowhere"}, DataError, r"folder=nowhere: no reference folder there"),
        ({"folder": None}, ConfigError, r"model\.reference\.folder: give a reference folder"),
        ({"encoder": "x"}, ConfigError, r"unknown key 'model\.reference\.encoder'"),
        ({"kind": "two_tower"}, ConfigError, r"model\.reference belongs to model\.kind=reference"),
    ],
)
def test_refusals(folder, settings, error, words):
    with pytest.raises(error, match=words):
        build(folder, **settings)


def test_a_kind_without_its_section_is_refused():
    with pytest.raises(ConfigError, match=r"kind=reference needs model\.reference"):
        models.build({"kind": "reference"})


@pytest.mark.parametrize("name", [*reference_folder.FILES, reference_folder.MANIFEST])
def test_a_damaged_folder_is_refused_by_name(tmp_path, name):
    made = reference_folders.make(tmp_path / "folder")
    path = tmp_path / "folder" / name
    if name == reference_folder.MANIFEST:
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "checksum": "0" * 64}))
    else:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} changed since the folder was made"):
        build(made)
    path.unlink()
    with pytest.raises(DataError, match=r"no reference folder|FileNotFoundError"):
        build(made)


def test_a_folder_that_was_not_finished_is_none_and_is_made_again(tmp_path):
    made = reference_folders.make(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "folder.partial")
    with pytest.raises(DataError, match="no reference folder"):
        build((str(tmp_path / "folder"), None))
    assert reference_folders.make(tmp_path / "folder")[1] == made[1]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

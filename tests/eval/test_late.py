"""Late interaction in evaluation, against loops over pairs and a model's own tokens in float64."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

from eval import finetune, knn, linear_probe, retrieval, zero_shot
from eval.sources.registry import REPOSITORY, Registry
from eval.sources.splits import EvalSplit
from eval.tasks import evaluation, scores
from eval.tasks import zero_shot as task
from eval.tasks.features import Extractor
from eval.tasks.scores import LateScores
from loaders import manifest, tokenizers, views
from loaders.errors import ConfigError, DataError
from models import weights
from tests.eval.conftest import MODEL, NAMES, write_run

TASKS = {"zero_shot": zero_shot, "retrieval": retrieval, "knn": knn}


def pair_score(query, candidate):
    """Mean over the tokens (N, d) of a query of the best product with one of (M, d)."""
    return (query @ candidate.T).max(axis=1).mean()


def table(queries, candidates):
    return np.array([[pair_score(q, c) for c in candidates] for q in queries])


def unit(generator, *shape):
    tokens = generator.normal(size=shape)
    return tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)


@pytest.mark.parametrize("products", [1, 500, 2**20])
def test_scores_equal_loops_over_pairs(products, monkeypatch):
    monkeypatch.setitem(scores.PRODUCTS, "cpu", products)
    generator = np.random.default_rng(0)
    images, texts = unit(generator, 7, 4, 5), unit(generator, 12, 6, 5)
    lengths = generator.integers(1, 5, size=12)  # the last places are padding everywhere
    mask = np.arange(6) < lengths[:, None]
    sides = torch.from_numpy(images), torch.from_numpy(texts)
    valid = torch.from_numpy(mask)
    cut = [text[m] for text, m in zip(texts, mask, strict=True)]
    to_text, to_image = table(images, cut), table(cut, images)
    assert np.abs(to_text - to_image.T).max() > 0.1
    np.testing.assert_allclose(LateScores(*sides, None, valid).whole(), to_text, atol=1e-12)
    turned = LateScores(*sides[::-1], valid, None)
    np.testing.assert_allclose(turned.whole(), to_image, atol=1e-12)
    np.testing.assert_allclose(turned.row(3), to_image[3], atol=1e-12)
    # Prompts of a class: the mean of their scores.
    classes = LateScores(*sides, None, valid, each=3)
    assert classes.shape == (7, 4)
    expected = to_text.reshape(7, 4, 3).mean(axis=2)
    np.testing.assert_allclose(classes.whole(), expected, atol=1e-12)


def test_no_token_and_nan_are_refused():
    tokens, mask = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(
        DataError, match=r"toys: 1 texts have no token to compare, the first is .* 1"
    ):
        LateScores(tokens, tokens, None, mask, "toys")
    with pytest.raises(DataError, match="toys: the candidate features hold NaN"):
        LateScores(tokens, tokens * torch.nan, None, None, "toys")


@pytest.fixture(scope="module")
def late(world, tmp_path_factory):
    """The sets of `world` and a run of a model that compares tokens."""
    root = tmp_path_factory.mktemp("late")
    # A seed without ties: in a causal tower texts share the tokens of a common beginning, and an
    # image that fits none of the others as well scores them alike.
    write_run(root / "runs/late", seed=6, similarity="late", token_dim=12)
    content = yaml.safe_load((world / "registry.yaml").read_text())
    content["datasets"]["toy_classes"]["tasks"]["knn"] = ["top1"]
    (root / "registry.yaml").write_text(yaml.safe_dump(content))
    return root


def command(late, name):
    return ["--checkpoint", str(late / "runs/late"), "--datasets", name,
            "--output", str(late / "results"), "--batch-size", "4", "--workers", "0"]  # fmt: skip


def evaluate(late, task, name):
    """Rows of a command by metric."""
    TASKS[task].main(command(late, name), late / "registry.yaml")
    lines = (late / "results" / f"late_{task}.jsonl").read_text().splitlines()
    return {row["metric"]: row for row in map(json.loads, lines)}


def tokens_of_images(late, world):
    """Tokens of the test images in float64, places only, labels and captions."""
    model = weights.load_run(late / "runs/late").model.double()
    shards = manifest.open_shards(str(world / "drawn_test"))
    transform, count = views.build_eval(32, 32), range(len(shards))
    pixels = torch.stack([transform(views.decode(shards.read_image(i))) for i in count]).double()
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        tokens = model.image((pixels / 255 - mean) / std)[1][:, 1:]  # without the class token
        tokens = tokens @ model.image_token_projection.weight.T
    captions = [shards.read_text(i) for i in count]
    return unit_rows(tokens), np.array(shards.labels), captions


def tokens_of_texts(late, texts):
    """Tokens of each text in float64, from its start to its end."""
    model = weights.load_run(late / "runs/late").model.double()
    ids = tokenizers.build("clip", MODEL["text"]["context_length"])(texts)
    with torch.no_grad():
        tokens = model.text(ids)[1] @ model.text_token_projection.weight.T
    ends = ids.argmax(dim=1).tolist()
    return [unit_rows(row[: end + 1]) for row, end in zip(tokens, ends, strict=True)]


def unit_rows(tokens):
    return (tokens / tokens.norm(dim=-1, keepdim=True)).numpy()


def test_zero_shot_averages_the_scores_of_the_prompts(late, world):
    got = evaluate(late, "zero_shot", "toy_classes")
    images, labels, _ = tokens_of_images(late, world)
    images, labels = images[labels >= 0], labels[labels >= 0]
    templates = json.loads((REPOSITORY / "prompts/templates.json").read_text())["clipart"]
    of_class = []
    for name in NAMES[:3]:
        prompts = [template.replace("{}", name) for template in templates["templates"]]
        of_class.append(table(images, tokens_of_texts(late, prompts)).mean(axis=1))
    expected = np.stack(of_class, axis=1)
    run = weights.load(late / "runs/late")
    extractor = Extractor(evaluation.make_accelerator(), run, late / "again", 4, 0)
    toys = Registry(late / "registry.yaml").datasets["toy_classes"]
    split = EvalSplit(toys, "test", extractor.size)
    found, _, _ = task.class_scores(extractor, split)
    np.testing.assert_allclose(found.whole(), expected, atol=1e-5)
    ranks, _, _, predicted = task.class_ranks(extractor, split)
    np.testing.assert_array_equal(predicted, expected.argmax(axis=1))
    own = np.take_along_axis(expected, labels[:, None], axis=1)
    np.testing.assert_array_equal(ranks, (expected > own).sum(axis=1))
    row = got["top1"]
    assert row["value"] == pytest.approx(100 * np.mean(predicted == labels))
    count = len(templates["templates"])
    assert f"mean of {count} scores, one a prompt, each of late interaction" in row["protocol"]


def test_retrieval_ranks_each_direction_by_its_own_scores(late, world):
    got = evaluate(late, "retrieval", "toy_captions")
    images, _, texts = tokens_of_images(late, world)
    folded = [re.sub(r"\s+", " ", text).lower() for text in texts]
    distinct = list(dict.fromkeys(folded))
    captions = tokens_of_texts(late, distinct)
    own = np.array([[text == folded[i] for text in distinct] for i in range(len(texts))])
    for direction, scored, positive in (
        ("image_to_text", table(images, captions), own),
        ("text_to_image", table(captions, images), own.T),
    ):
        best = np.where(positive, scored, -1).max(axis=1, keepdims=True)
        assert np.abs(np.where(positive, 9, scored) - best).min() > 1e-4
        order = np.argsort(-scored, axis=1)
        for k in (1, 5, 10):
            hit = [positive[i, order[i, :k]].any() for i in range(len(scored))]
            assert got[f"{direction}_r{k}"]["value"] == pytest.approx(100 * np.mean(hit))
    assert "by late interaction" in got["image_to_text_r1"]["protocol"]


def test_what_needs_one_vector_says_which_or_refuses(late):
    row = evaluate(late, "knn", "toy_classes")["top1"]
    assert "by cosine of the pooled image feature" in row["protocol"]
    registry = late / "registry.yaml"
    with pytest.raises(ConfigError, match=r"late: the ELEVATER protocol .* standardised or clip"):
        linear_probe.main([*command(late, "toy_classes"), "--protocol", "elevater"], registry)
    with pytest.raises(ConfigError, match=r"late: model\.similarity=late .* --head-init random"):
        finetune.main([*command(late, "toy_classes"), "--epochs", "1"], registry)

"""The index against features and numpy, and the pages in a real browser."""

import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from selenium.webdriver.common.by import By
from sklearn.metrics import confusion_matrix

from eval import explore
from eval.explorer import confusion, index, opening, site
from eval.sources.registry import Registry
from eval.sources.splits import EvalSplit
from eval.tasks import evaluation, zero_shot
from eval.tasks.features import Extractor
from loaders.errors import ConfigError
from models import weights
from tests import browser
from tests.eval.conftest import NAMES, drawing, write_run, write_set

RUNS = ("tiny", "other")


def arguments(world, output, *runs):
    """Of the command, for the drawn test set."""
    given = ["--checkpoint", *(str(world / "runs" / run) for run in runs)]
    given += ["--data", str(world / "drawn_test"), "--output", str(output)]
    given += ["--templates", "clipart", "--batch-size", "5", "--workers", "0"]
    return explore.parser().parse_args(given)


@pytest.fixture(scope="module")
def explorer(world, tmp_path_factory):
    """Two models on the drawn test set."""
    write_run(world / "runs/other", seed=1)
    return opening.explorer(arguments(world, tmp_path_factory.mktemp("index"), *RUNS))


@pytest.fixture(scope="module")
def address(explorer):
    """Where the pages are served."""
    with explore.bind(0) as bound:
        server = site.server(explorer, bound)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()
        thread.join()


def test_nearest_rows_are_those_of_the_dense_product(monkeypatch):
    monkeypatch.setattr(index, "PIECE", 7)
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 6)).astype(np.float16)
    rows[11] = np.nan
    query = random.normal(size=6)
    products = rows.astype(np.float64) @ query
    products[[11, 23]] = -np.inf
    expected = np.argsort(-products)[:38]
    found = index.nearest(rows, torch.tensor(query, dtype=torch.float32), 50, without=23)
    assert [i for i, _ in found] == expected.tolist()
    np.testing.assert_allclose([score for _, score in found], products[expected], rtol=1e-4)


def test_index_holds_the_features_of_the_evaluation(explorer, world, tmp_path):
    run = weights.load(world / "runs/other")
    extractor = Extractor(evaluation.make_accelerator(), run, tmp_path, 64, 0)
    row = Registry(world / "registry.yaml").datasets["toy_captions"]
    split = EvalSplit(row, "test", extractor.size)
    captions, owner = split.distinct_texts()
    made, here = explorer.indexes[0][1], explorer.collections[0]
    for rows, features in (
        (made.images, extractor.images(split)),
        (made.captions, extractor.texts(captions, "captions")),
    ):
        assert rows.dtype == np.float16
        np.testing.assert_allclose(rows, features["feature"].numpy(), atol=1e-3)
    assert [here.captions(i)[k] for i, k in made.places.tolist()] == captions
    assert made.places[:, 0].tolist() == [owner.tolist().index(t) for t in range(len(captions))]


def test_confusions_agree_with_zero_shot_evaluation(explorer, world, tmp_path):
    run = weights.load(world / "runs/tiny")
    extractor = Extractor(evaluation.make_accelerator(), run, tmp_path, 64, 0)
    row = Registry(world / "registry.yaml").datasets["toy_classes"]
    _, true, _, said = zero_shot.class_ranks(extractor, EvalSplit(row, "test", extractor.size))
    matrix = confusion_matrix(true, said)
    here, predicted = explorer.collections[0], explorer.indexes[0][0].predicted
    found = confusion.confusions(here.labels, predicted)
    assert (found.n, found.right) == (matrix.sum(), np.trace(matrix))
    pairs = {(int(a), int(b)): int(matrix[a, b]) for a, b in np.argwhere(matrix) if a != b}
    assert {(a, b): count for a, b, count in found.pairs} == pairs
    assert pairs
    for (a, b), count in pairs.items():
        assert len(confusion.samples(here.labels, predicted, a, b)) == count


def test_an_interrupted_index_goes_on_where_it_was(tmp_path):
    whole = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16)
    started = []

    def batches(start, until=20):
        started.append(start)
        for first in range(start, 20, 4):
            if first >= until:
                raise KeyboardInterrupt
            yield whole[first : first + 4]

    path = tmp_path / "images.npy"
    with pytest.raises(KeyboardInterrupt):
        index.filled(path, (20, 3), lambda start: batches(start, 8), "test")
    assert not path.exists()
    for _ in range(2):  # the second time nothing is left to do
        rows = index.filled(path, (20, 3), batches, "test")
        np.testing.assert_array_equal(rows, whole)
    assert started == [0, 8]
    assert [file.name for file in tmp_path.iterdir()] == ["images.npy"]


def test_another_checkpoint_or_content_is_another_index(explorer, world, tmp_path):
    """And the same is found again: no picture is encoded a second time."""
    write_set(tmp_path / "set", "image_label", [
        {"png": drawing(i % 3, np.random.default_rng(i)), "cls": i % 3} for i in range(4)
    ])  # fmt: skip
    args = arguments(world, tmp_path / "out", "tiny")
    args.data = [tmp_path / "set"]

    def made():
        opened = opening.explorer(args)
        names = {path.parent.name for path in (tmp_path / "out").glob("*/images.npy")}
        return opened.indexes[0][0].images.copy(), names

    first, one = made()
    assert made()[1] == one
    write_set(tmp_path / "set", "image_label", [
        {"png": drawing(i % 3, np.random.default_rng(i)) if i else b"broken", "cls": i % 3}
        for i in range(4)
    ])  # fmt: skip
    second, two = made()
    assert len(one) == 1
    assert len(two) == 2
    assert one < two
    assert np.isnan(second[0]).all()
    assert (first[1:] == second[1:]).all()
    args.checkpoint = [world / "runs/other"]
    assert len(made()[1]) == 3


def test_pages_of_what_cannot_be_read(world, tmp_path):
    """An unreadable picture of the set and one of the visitor, what is not there, odd words."""
    samples = [{"png": drawing(0, np.random.default_rng(i)), "txt": f"tile {i}"} for i in range(3)]
    samples[0] = {"png": b"broken", "txt": "<b>odd</b>"}
    write_set(tmp_path / "set", "image_text", samples)
    args = arguments(world, tmp_path / "out", "tiny")
    args.data = [tmp_path / "set"]
    client = site.application(opening.explorer(args)).test_client()
    page = client.get("/0/?text=<i>x</i>").text
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    assert "&lt;i&gt;x" in page
    assert "like=1" in page
    assert "<b>odd" not in page
    assert "This picture cannot be read" in client.get("/0/?like=0").text
    for path, code in (
        ("/0/picture/0-192.jpg", 404), ("/0/picture/1-192.jpg", 200), ("/0/picture/1-99.jpg", 404),
        ("/0/picture/3-192.jpg", 404), ("/0/?like=3", 404), ("/1/", 404), ("/0/?upload=x", 404),
        ("/0/confusions", 404),
    ):  # fmt: skip
        assert client.get(path).status_code == code, path
    upload = {"picture": (tmp_path / "set/manifest.json").open("rb")}
    answer = client.post("/0/upload", data=upload)
    assert answer.status_code == 400
    assert "not a picture that can be read" in answer.text


def test_pages_serve_this_machine_alone(address):
    with urllib.request.urlopen(f"{address}/0/") as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    foreign = urllib.request.Request(f"{address}/0/", headers={"Host": "pages.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(foreign)


def test_a_port_that_is_taken_is_named(address):
    port = int(address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"--port {port}: .*in use.*; name another"):
        explore.bind(port)


def test_a_model_that_compares_tokens_is_refused(world, tmp_path):
    write_run(world / "runs/late", seed=6, similarity="late", token_dim=12)
    with pytest.raises(ConfigError, match="similarity=late compares tokens"):
        opening.explorer(arguments(world, tmp_path, "late"))


def figures(page):
    """Numbers of the samples whose pictures a part of a page shows, in order."""
    links = page.find_elements(By.CSS_SELECTOR, "figure a.picture")
    return [int(link.get_attribute("href").rpartition("like=")[2]) for link in links]


def whole(driver, address):
    """Every picture has arrived, nothing was asked of another server, nothing juts out."""
    driver.execute_script("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    sizes = driver.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
        ".then(done, error => done(String(error)));"
    )
    assert sizes
    assert all(isinstance(size, int) and size > 0 for size in sizes), sizes
    asked = driver.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert any(name.endswith("style.css") for name in asked)
    assert [name for name in asked if not name.startswith(f"{address}/")] == []
    for width in (1400, 390):
        driver.set_window_size(width, 900)
        inner, content = driver.execute_script(
            "return [document.documentElement.clientWidth, document.documentElement.scrollWidth]"
        )
        assert content <= inner, (width, inner, content)


def test_in_a_browser(explorer, address, world, tmp_path):
    """Words, a click, a picture of the visitor's own, and the confusions; two models each."""
    here, indexes = explorer.collections[0], explorer.indexes[0]
    with browser.chromium(tmp_path / "profile") as driver:
        driver.get(address)
        assert len(figures(driver)) == 23
        box = driver.find_element(By.NAME, "text")
        box.send_keys("a circle\n")
        columns = driver.find_elements(By.CSS_SELECTOR, ".columns > section")
        titles = [column.find_element(By.TAG_NAME, "h2").text for column in columns]
        assert titles == ["tiny, step 7", "other, step 7"]
        for column, encoder, made in zip(columns, explorer.encoders, indexes, strict=True):
            vector = encoder.texts(["a circle"])[0]
            expected = [i for i, _ in index.nearest(made.images, vector, 24)]
            assert figures(column) == expected
            best = column.find_element(By.CSS_SELECTOR, "table tr").text.split()
            assert best[0] in NAMES
            assert -1 <= float(best[1]) <= 1
        whole(driver, address)

        clicked = figures(driver)[3]
        driver.find_elements(By.CSS_SELECTOR, "figure a.picture")[3].click()
        assert clicked not in figures(driver)
        assert here.source.where(clicked) in driver.find_element(By.CLASS_NAME, "asked").text
        whole(driver, address)

        Image.Image.save(here.image(clicked), tmp_path / "mine.png")
        driver.find_element(By.NAME, "picture").send_keys(str(tmp_path / "mine.png"))
        driver.find_element(By.XPATH, "//button[text()='Search by picture']").click()
        assert figures(driver)[0] == clicked
        whole(driver, address)

        driver.find_element(By.LINK_TEXT, "Confusions").click()
        found = confusion.confusions(here.labels, indexes[0].predicted)
        true, said, count = found.pairs[0]
        first = driver.find_element(By.CSS_SELECTOR, ".confusions li")
        named = f"{here.classes[true]} taken for {here.classes[said]}:"
        assert first.text.split()[:-2] == named.split()
        whole(driver, address)
        first.find_element(By.PARTIAL_LINK_TEXT, f"{count} picture").click()
        assert all(here.labels[i] == true for i in figures(driver))
        assert len(figures(driver)) == count
        whole(driver, address)

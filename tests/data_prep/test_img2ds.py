"""Real img2dataset runs over the test server: what is kept, and what becomes of the rest."""

import hashlib
import io
import json
import shutil
import sys
import tarfile
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.download.img2ds_launch import check_shard
from data_prep.download.reasons import reason_group
from data_prep.sets import set_folder
from loaders.manifest import open_shards
from tests.data_prep import downloads, http_server
from tests.data_prep.downloads import BODIES, EXPECTED, SHARD, command, kept, rows, run, write_list
from tests.data_prep.http_server import BOMB_PIXELS, serve

PATHS = list(EXPECTED)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    yield from downloads.base(tmp_path_factory.getbasetemp() / "download")


@pytest.fixture(scope="session")
def halves(tmp_path_factory):
    """A GCC-12M-shaped list fetched by two commands at the same time, no opt-out respected."""
    home = tmp_path_factory.mktemp("halves")
    with serve() as server:
        tsv = write_list(home / "cc12m.tsv", server, PATHS[:30], url_first=True)
        common = ["--disallowed-header-directives", "--parts", "2"]
        commands = [
            command(tsv, home / "D", *common, "--part", part, samples_per_shard=8, processes=1)
            for part in (0, 1)
        ]
        with downloads.marked(commands[0]) as first, downloads.marked(commands[1]) as second:
            first.finish()
            second.finish()
        yield home / "D", tsv, dict(server.requests)


def test_every_row_is_kept_or_has_its_reason(base):
    found = {PATHS[row["row"]]: reason_group(row["error_message"] or "success")
             for row in rows(base.out)}  # fmt: skip
    assert found == EXPECTED
    assert len(rows(base.out)) == len(PATHS)


def test_kept_images_are_those_of_the_server_and_shards_hold_the_list_in_order(base):
    for row in rows(base.out):
        path = PATHS[row["row"]]
        assert row["url"] == base.server.url(path)
        assert row["caption"] == f'"caption of {path}'
        assert row["shard"] == row["row"] // SHARD
        assert row["key"] == set_folder.sample_key(row["shard"], row["row"] % SHARD, SHARD)
        if EXPECTED[path] == "success":
            assert row["sha256"] == hashlib.sha256(BODIES[path]).hexdigest()


def test_stored_images_keep_their_ratio_and_are_only_made_smaller(base):
    sizes = {}
    for tar in (base.out / "shards").glob("*.tar"):
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".jpg"):
                    image = Image.open(members.extractfile(member))
                    image.load()
                    key = (int(tar.stem), int(member.name[5:].split(".")[0]))
                    sizes[PATHS[key[0] * SHARD + key[1]]] = (image.format, image.size, image.mode)
    assert set(sizes) == {path for path, group in EXPECTED.items() if group == "success"}
    assert {form for form, _, _ in sizes.values()} == {"JPEG"}
    assert sizes["/large.jpg"][1] == (384, 256)  # 900 x 600
    assert sizes["/tiny.png"][1] == (20, 12)
    assert sizes["/rotated.jpg"][1] == (320, 240)  # img2dataset does not turn images
    assert sizes["/grey.jpg"][2] == "L"
    assert sizes["/cmyk.jpg"][2] == "RGB"


def test_shards_are_closed_by_verify_and_read_by_the_loader(base, tmp_path):
    out = tmp_path / "D"
    shutil.copytree(base.out, out)
    done = run([sys.executable, str(downloads.REPOSITORY / "data_prep" / "verify.py"), str(out)])
    assert done.returncode == 0, done.stdout + done.stderr
    shards = open_shards(out)
    assert shards.kind == "image_text"
    expected = {}
    for tar in sorted((base.out / "shards").glob("*.tar")):
        with tarfile.open(tar) as members:
            expected |= {member.name: members.extractfile(member).read() for member in members}
    assert len(shards) * 3 == len(expected)
    for i in range(len(shards)):
        key = shards.key(i)
        assert shards.read_image(i) == expected[f"{key}.jpg"]
        assert shards.read_text(i) == expected[f"{key}.txt"].decode()
        row = json.loads(expected[f"{key}.json"])["row"]
        assert shards.read_text(i) == f'"caption of {PATHS[row]}'
    assert json.loads((out / "manifest.json").read_bytes())["yield"] == {
        "attempted": len(PATHS),
        "kept": len(shards),
    }


def test_requests_are_polite(base):
    """Refusals for good are asked once, others as often as --retries says, with our name."""
    asked_twice = {"http 5xx", "incomplete", "timeout", "connection"}
    for path, group in EXPECTED.items():
        if path in ("/loop", "/flaky.jpg", "/busy.jpg", "/hops/5", "/redirect5.jpg"):
            continue
        asked = 0 if group in ("bad url", "credentials in url") else 1
        assert base.requests.get(path, 0) == (2 if group in asked_twice else asked), path
    assert base.requests["/flaky.jpg"] == base.requests["/busy.jpg"] == 2
    assert base.requests["/loop"] <= 6
    assert base.server.agents == {agent for agent in base.server.agents if "unicl-test" in agent}


def test_the_summary_counts_the_reasons(base):
    groups = Counter(EXPECTED.values())
    assert f"kept {groups.pop('success')} of {len(PATHS)} rows" in base.printed
    table = [line.split() for line in base.printed.splitlines() if line.startswith("  ")]
    assert {" ".join(words[:-2]): int(words[-2]) for words in table} == groups
    assert f"retry: python data_prep/retry_failed.py {base.out}" in base.printed
    assert f"next: python data_prep/verify.py {base.out}" in base.printed


def test_a_finished_set_is_left_alone(base):
    before, requests = downloads.state(base.out), dict(base.server.requests)
    (base.out / "manifest.json").write_text("closed")
    done = run(command(base.tsv, base.out))
    assert done.returncode == 0, done.stderr
    assert (base.out / "manifest.json").read_text() == "closed"
    (base.out / "manifest.json").unlink()
    assert downloads.state(base.out) == before
    assert base.server.requests == requests


def test_only_shards_are_in_the_folder_of_shards(base):
    """A shard without an image has no tar, which a range of tars would meet."""
    names = {f"{shard:05d}{end}" for shard in range(-(-len(PATHS) // SHARD))
             for end in (".tar", ".parquet", "_stats.json")}  # fmt: skip
    filled = {row // SHARD for row, path in enumerate(PATHS) if EXPECTED[path] == "success"}
    empty = {f"{shard:05d}.tar" for shard in range(-(-len(PATHS) // SHARD))} - {
        f"{shard:05d}.tar" for shard in filled
    }
    assert len(empty) == 1
    names -= empty
    assert {path.name for path in (base.out / "shards").iterdir()} == names
    assert [path.name for path in (base.out / "work").iterdir()] == ["00000-of-00001.lock"]


def test_two_parts_make_together_what_one_makes(base, halves):
    out = halves[0]
    opted_out = {PATHS.index("/noai.jpg"), PATHS.index("/noindex.jpg")}
    both = dict(kept(out))
    assert {row: both[row] for row in both if row not in opted_out} == {
        row: sha for row, sha in kept(base.out) if row < 30
    }
    assert sorted(row["row"] for row in rows(out)) == list(range(30))
    assert {row["shard"] for row in rows(out)} == {0, 1, 2, 3}
    assert [path.name for path in (out / "shards").glob("*.tar") if int(path.stem) > 3] == []


def test_opt_outs_are_taken_when_no_directive_is_named(halves):
    found = dict(kept(halves[0]))
    for path in ("/noai.jpg", "/noindex.jpg"):
        assert found[PATHS.index(path)] == hashlib.sha256(BODIES[path]).hexdigest()


def test_another_list_or_size_is_refused(halves, base):
    out, tsv, _ = halves
    before = downloads.state(out)
    for changed in (
        command(base.tsv, out, samples_per_shard=8),
        command(tsv, out, samples_per_shard=9),
        command(tsv, out, "--image-size", "128", samples_per_shard=8),
        command(tsv, out, samples_per_shard=8),  # opt-outs respected now
        command(tsv, out, "--disallowed-header-directives", samples_per_shard=8, min_image_size=20),
    ):
        done = run(changed)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "error: " in done.stderr
    assert "min_image_size: 10 there, 20 now" in done.stderr
    assert downloads.state(out) == before


def test_nothing_kept_is_an_error_and_private_addresses_are_not_asked(tmp_path):
    with serve() as server:
        hosts = ("127.0.0.1", "localhost", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]")
        lines = [f"caption\thttp://{host}:{server.port}/jpeg/1.jpg" for host in hosts]
        (tmp_path / "l.tsv").write_text("\n".join(lines))
        arguments = command(tmp_path / "l.tsv", tmp_path / "D", processes=1)
        arguments.remove("--allow-private-addresses")
        done = run(arguments)
        assert not server.requests
    assert done.returncode == 3, done.stdout + done.stderr
    assert (
        f"not one of {len(hosts)} rows gave an image (private address {len(hosts)})" in done.stderr
    )
    assert set_folder.finished(tmp_path / "D")[0]["successes"] == 0
    assert list((tmp_path / "D" / "shards").glob("*.tar")) == []  # nothing for a range of tars
    advice = "retry_failed.py {} --reasons 'private address' --allow-private-addresses"
    assert advice.format(tmp_path / "D") in done.stderr
    assert "retry" not in done.stdout
    assert "proxy" not in done.stderr
    again = run(arguments)
    assert again.returncode == 3
    assert "retry_failed.py" in again.stderr


_NAMESPACE = """
import sys
from tests.data_prep.downloads import command, rows, run
from tests.data_prep.http_server import serve
from pathlib import Path
home = Path(sys.argv[1])
with serve("93.184.215.14") as server:
    inside = f"http://10.1.2.3:{server.port}/jpeg/2.jpg"
    unknown = "http://no.such.host.invalid/1.jpg"
    urls = [server.url("/jpeg/1.jpg"), server.url("/inside.jpg"), inside, unknown]
    (home / "l.tsv").write_text("".join(f"caption\\t{url}\\n" for url in urls))
    arguments = command(home / "l.tsv", home / "D", processes=1)
    arguments.remove("--allow-private-addresses")
    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resolver" not in done.stdout  # one host of four tells nothing
    assert "--reasons 'private address' --allow-private-addresses" in done.stdout
    assert set(server.requests) == {"/jpeg/1.jpg", "/inside.jpg"}, server.requests
for row in sorted(rows(home / "D"), key=lambda row: row["row"]):
    print(row["error_message"] or row["status"])
"""


def test_a_redirect_to_a_private_address_is_not_followed(tmp_path):
    """In a network of its own, where a public address is ours."""
    lines = downloads.run_in_own_network(_NAMESPACE, ("93.184.215.14", "10.1.2.3"), tmp_path)
    groups = [reason_group(line) for line in lines]
    assert groups == ["success", "private address", "private address", "dns"]


def test_a_shard_that_does_not_hold_what_it_states_is_found(base, tmp_path):
    stats = set_folder.finished(base.out)[0]
    shards = tmp_path / "shards"

    def fresh():
        shutil.rmtree(shards, ignore_errors=True)
        shutil.copytree(base.out / "shards", shards)

    fresh()
    assert check_shard(shards, 0, stats, SHARD) is None
    assert "13 rows in the list" in check_shard(shards, 0, stats, SHARD + 1)
    tar = shards / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    assert "damaged" in check_shard(shards, 0, stats, SHARD)
    fresh()
    shutil.copy(shards / "00002.parquet", shards / "00000.parquet")
    shutil.copy(shards / "00003.tar", tar)
    assert "images in the tar" in check_shard(shards, 0, stats, SHARD)
    (shards / "00000.parquet").write_bytes(b"")
    assert "damaged" in check_shard(shards, 0, stats, SHARD)


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    with serve() as server:
        tsv = write_list(tmp_path / "l.tsv", server, ["/jpeg/1.jpg"])
        done = run(command(tsv, tmp_path / "D[1]"))
    assert done.returncode == 2
    assert "pattern" in done.stderr
    assert not (tmp_path / "D[1]").exists()


def test_the_server_is_what_it_says():
    """The oddities that the tests above rest on."""
    bomb = Image.open(io.BytesIO(http_server.bomb()))
    assert np.prod(bomb.size) == BOMB_PIXELS
    assert len(http_server.bomb()) < 100_000
    with serve() as server:
        with pytest.raises(ConnectionResetError):
            urllib.request.urlopen(server.url("/reset.jpg"))
        assert urllib.request.urlopen(server.url("/hops/5")).read() == BODIES["/redirect5.jpg"]
        assert Path(urllib.request.urlopen(server.url("/noai.jpg")).url).name == "noai.jpg"

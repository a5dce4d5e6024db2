"""The opener of the child process, the groups of reasons, and options that cannot work."""

import gzip
import shutil
import ssl
import subprocess
import threading
import urllib.request
import zlib

import pytest

from data_prep.download import img2ds_body, img2ds_child, options
from data_prep.download.options import Options
from data_prep.download.reasons import FAILURES, reason_group
from loaders.errors import ConfigError
from tests.data_prep import http_server
from tests.data_prep.http_server import LIMIT


@pytest.fixture
def opener(tmp_path):
    """The child's opener in this process."""

    def make(**changed):
        settings = {
            "image_seconds": 5,
            "max_image_bytes": LIMIT,
            "allow_private_addresses": True,
            "local_root": None,
            "user_agent_token": "x",
            "disallowed_header_directives": [],
            "started": str(tmp_path / "started"),
        }
        return img2ds_child.Opener(settings | changed)

    return make


def fetch(opener, url):
    """What img2dataset does with the installed opener."""
    with opener.open(urllib.request.Request(url), None, 2) as response:
        return response.read()


def test_files_are_read_below_the_local_root_alone(opener, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a b.jpg").write_bytes(b"image")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    local = opener(local_root=str(tmp_path / "root"))
    assert fetch(local, f"file://{tmp_path}/root/a%20b.jpg") == b"image"
    (tmp_path / "root" / "large").write_bytes(bytes(LIMIT + 1))
    for name, group in {
        "secret": "scheme not allowed",
        "root/../secret": "scheme not allowed",
        "root/link": "scheme not allowed",
        "root/none": "missing file",
        "root/large": "too large",
    }.items():
        with pytest.raises(OSError, match=r".") as caught:
            fetch(local, f"file://{tmp_path}/{name}")
        assert reason_group(str(caught.value)) == group, name
    for url in (f"file://{tmp_path}/root/a%20b.jpg", "ftp://127.0.0.1/x", "data:,x", "jar:x"):
        with pytest.raises(OSError, match="scheme not allowed"):
            fetch(opener(), url)


def test_https_is_fetched_under_the_same_limits(opener, tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is not installed")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out",
         "cert.pem", "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    server = http_server.Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    address = f"https://127.0.0.1:{server.port}"
    try:
        with pytest.raises(OSError, match="certificate") as caught:
            fetch(opener(), f"{address}/jpeg/1.jpg")
        assert reason_group(str(caught.value)) == "tls"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert fetch(opener(), f"{address}/jpeg/1.jpg") == http_server.jpeg(1)
        for path, group in {"/endless.jpg": "too large", "/drip.jpg": "too slow"}.items():
            with pytest.raises(OSError, match=r".") as caught:
                fetch(opener(image_seconds=1), address + path)
            assert reason_group(str(caught.value)) == group
        with pytest.raises(OSError, match="private address"):
            fetch(opener(allow_private_addresses=False), f"{address}/jpeg/2.jpg")
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
    ],
)
def test_public_addresses(address, public):
    assert img2ds_child.is_public(address) is public


@pytest.mark.parametrize(
    ("message", "group"),
    [
        ("<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [Errno 111] Connection refused>", "connection"),
        ("<urlopen error [Errno 113] No route to host>", "connection"),
        ("<urlopen error [Errno 110] Connection timed out>", "timeout"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("Remote end closed connection without response", "connection"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate "
         "has expired (_ssl.c:1006)>", "tls"),
        ("_ssl.c:989: The handshake operation timed out", "timeout"),
        ("<urlopen error EOF occurred in violation of protocol (_ssl.c:1006)>", "tls"),
        ("HTTP Error 404: Not Found", "http 404"),
        ("HTTP Error 429: Too Many Requests", "http 429"),
        ("HTTP Error 451: Unavailable For Legal Reasons", "http 4xx"),
        ("HTTP Error 521: ", "http 5xx"),
        ("HTTP Error 308: Permanent Redirect", "redirect"),
        ("URL can't contain control characters. '/a b' (found at least ' ')", "bad url"),
        ("nonnumeric port: 'x'", "bad url"),
        ("IncompleteRead(1000 bytes read, 5533 more expected)", "incomplete"),
        ("Image decoding error", "not an image"),
        ("<urlopen error [Errno -8] Servname not supported for ai_socktype>", "bad url"),
        ("compressed body (br)", "compressed body"),
        ("image too small", "image too small"),
        ("aspect ratio too large", "aspect ratio"),
        ("something new", "other"),
        ("", "other"),
        ("success", "success"),
    ],
)  # fmt: skip
def test_reason_groups(message, group):
    assert reason_group(message) == group
    assert group in (*FAILURES, "success")


@pytest.mark.parametrize(
    ("body", "other"),
    [
        (b"", "empty body"),
        (b"\xef\xbb\xbf \n<!-- a --><!DOCTYPE HTML>", "html page"),
        (b"<script>location='/'</script>", "html page"),
        (b"<!DOCTYPE svg PUBLIC><svg/>", "svg"),
        (b"<?xml version='1.0'?><Error/>", None),
        (b" [1, 2]", "json"),
        (b"{no json", None),
        (b"%PDF-1.4", "pdf"),
        (gzip.compress(b"x", mtime=0), "compressed body (gzip, not announced)"),
        (b"P6 1 1 255 \0\0\0", None),
        (b"\xff\xd8\xff\xe0<html>", None),
        (b"[" * 100_000, None),
    ],
)
def test_bodies_that_are_no_images_are_named(body, other):
    assert img2ds_body.name_other(body) == other


def test_encoded_bodies_are_decoded_within_the_limit():
    image = http_server.jpeg(1)
    packed, limit = gzip.compress(image), len(image)
    for body, encoding in (
        (packed, "gzip"),
        (packed, "X-GZIP, identity"),
        (zlib.compress(image), "deflate"),
        (gzip.compress(zlib.compress(image)), "deflate, gzip"),
        (image, ""),
        (image, "gzip"),  # claimed, not done
    ):
        assert img2ds_body.decompress(body, encoding, limit + 99) == image
    for body, encoding, words in (
        (packed[:-20], "gzip", "compressed body .gzip, damaged"),
        (image, "deflate", "compressed body .deflate, damaged"),
        (image, "zstd", "compressed body .zstd"),
        (image, "gzip," * 6, "compressed body .6 encodings"),
    ):
        with pytest.raises(img2ds_body.NoImage, match=words):
            img2ds_body.decompress(body, encoding, limit)
    assert img2ds_body.decompress(packed, "gzip", limit) == image
    with pytest.raises(img2ds_body.NoImage, match="too large"):
        img2ds_body.decompress(packed, "gzip", limit - 1)


def test_limits_are_part_of_the_plan_where_they_are_in_force():
    assert options.identity(Options(), 10).keys().isdisjoint(options._LIMITS)
    plan = options.identity(Options(min_image_size=64, max_aspect_ratio=3.0), 10)
    assert (plan["min_image_size"], plan["max_aspect_ratio"]) == (64, 3.0)
    for chosen in (Options(), Options(min_image_size=64, max_aspect_ratio=3.0)):
        again = options.from_identity(options.identity(chosen, 10))
        assert Options(**{**again, "disallowed_header_directives":
                                 chosen.disallowed_header_directives}) == chosen  # fmt: skip


def test_options_that_cannot_work_are_refused():
    for wrong in (
        {"threads": 0},
        {"encode_quality": 101},
        {"min_image_size": -1},
        {"max_aspect_ratio": 0.5},
        {"max_aspect_ratio": float("nan")},
        {"retries": -1},
        {"stall_minutes": 1.0, "image_seconds": 30.0, "retries": 1},
    ):
        with pytest.raises(ConfigError):
            Options(**wrong)

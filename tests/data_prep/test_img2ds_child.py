"""The opener of the child process, the groups of reasons, and options that cannot work."""

import shutil
import ssl
import subprocess
import threading
import urllib.request

import pytest

from data_prep import img2ds, img2ds_child
from data_prep.reasons import FAILURES, reason_group
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
        ("something new", "other"),
        ("", "other"),
        ("success", "success"),
    ],
)  # fmt: skip
def test_reason_groups(message, group):
    assert reason_group(message) == group
    assert group in (*FAILURES, "success")


def test_options_that_cannot_work_are_refused():
    for wrong in (
        {"threads": 0},
        {"encode_quality": 101},
        {"retries": -1},
        {"stall_minutes": 1.0, "image_seconds": 30.0, "retries": 1},
    ):
        with pytest.raises(ConfigError):
            img2ds.Options(**wrong)

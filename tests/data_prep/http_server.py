"""A web server on loopback with good images and everything that goes wrong on the web.

    with serve() as server:
        server.url("/jpeg/1.jpg"); server.requests["/jpeg/1.jpg"]; server.agents

`python tests/data_prep/http_server.py` serves until its standard input is closed, and prints its
address first.
"""

import gzip
import io
import socket
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

LIMIT = 2 << 20  # max_image_bytes to use in tests: /huge.jpg and /endless.jpg are larger
BOMB_PIXELS = 60_000_000
_OPT_OUT = "X-Robots-Tag"


@cache
def picture(seed: int, size: tuple[int, int] = (320, 240), mode: str = "RGB") -> Image.Image:
    """A smooth random picture."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, bands), dtype=np.uint8)
    layers = [Image.fromarray(small[..., band]) for band in range(bands)]
    layers = [layer.resize(size, Image.Resampling.BICUBIC) for layer in layers]
    return Image.merge(mode, layers) if bands > 1 else layers[0].convert(mode)


def encode(image: Image.Image, form: str, **options) -> bytes:
    """Bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@cache
def jpeg(number: int) -> bytes:
    """Body of /jpeg/NUMBER.jpg."""
    return encode(picture(number), "JPEG")


@cache
def noise(number: int) -> bytes:
    """Body of /noise/NUMBER.jpg: about 90 kB, and not much less when it is stored again."""
    pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", quality=90)


@cache
def photo(number: int) -> bytes:
    """Body of /photo/NUMBER.jpg: 300 to 900 pixels wide, as detailed as a photograph."""
    generator = np.random.default_rng(number)
    width, height = (int(side) for side in generator.integers(300, 901, 2))
    smooth = np.asarray(picture(number, (width, height)), dtype=np.int16)
    grain = generator.normal(0, 12, smooth.shape)
    return encode(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)), "JPEG")


@cache
def images() -> dict[str, bytes]:
    """Bodies of the good images of other kinds, by path."""
    deep = np.random.default_rng(9).integers(0, 1 << 16, (240, 320), dtype=np.uint16)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    return {
        "/large.jpg": encode(picture(1, (900, 600)), "JPEG"),
        "/tiny.png": encode(picture(2, (20, 12)), "PNG"),
        "/image.png": encode(picture(3), "PNG"),
        "/image.webp": encode(picture(4), "WEBP"),
        "/image.gif": encode(picture(5), "GIF"),
        "/cmyk.jpg": encode(picture(6, mode="CMYK"), "JPEG"),
        "/grey.jpg": encode(picture(7, mode="L"), "JPEG"),
        "/alpha.png": encode(picture(8, mode="RGBA"), "PNG"),
        "/16bit.png": encode(Image.fromarray(deep), "PNG"),
        "/rotated.jpg": encode(picture(10), "JPEG", exif=orientation),
        "/otherbot.jpg": jpeg(1001),
        "/noai.jpg": jpeg(1002),
        "/noindex.jpg": jpeg(1003),
        "/redirect5.jpg": jpeg(1004),
        "/flaky.jpg": jpeg(1005),
        "/mended.jpg": jpeg(1006),
        "/busy.jpg": jpeg(1007),
    }


@cache
def bomb() -> bytes:
    """A PNG of 60 million pixels in a few kilobytes."""
    return encode(Image.new("1", (10_000, BOMB_PIXELS // 10_000)), "PNG")


HEADERS = {
    "/noai.jpg": [(_OPT_OUT, "noai")],
    "/noindex.jpg": [(_OPT_OUT, "nofollow, NoIndex")],
    "/otherbot.jpg": [(_OPT_OUT, "otherbot: noai")],
}


class Server(ThreadingHTTPServer):
    """Counts requests by path; `mended` makes /mended.jpg answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str = "127.0.0.1", delay: float = 0.0) -> None:
        super().__init__((host, 0), Handler)
        self.host, self.port, self.delay = host, self.server_address[1], delay
        self.requests: Counter = Counter()
        self.agents: set[str] = set()
        self.mended = False
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        """Address of a path; of some the trouble is in the address."""
        if path == "/port.jpg":
            return f"http://{self.host}:99999{path}"
        login = "user:pw@" if path == "/credentials.jpg" else ""
        return f"http://{login}{self.host}:{self.port}{path}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """Answers by path: a method for each kind of trouble, else an image, else 404."""

    protocol_version = "HTTP/1.0"
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with _LOCK:
            self.server.requests[self.path] += 1
            self.seen = self.server.requests[self.path]
            self.server.agents.add(self.headers["User-Agent"])
        if self.server.delay:
            self.server.closing.wait(self.server.delay)
        name = path.strip("/").partition(".")[0].partition("/")[0]
        trouble: Callable[[], None] | None = getattr(self, f"trouble_{name}", None)
        if trouble:
            trouble()
        elif name in ("jpeg", "noise", "photo"):
            body = {"jpeg": jpeg, "noise": noise, "photo": photo}[name]
            self.answer(body(int(path.rpartition("/")[2].removesuffix(".jpg"))))
        elif path in images():
            self.answer(images()[path], HEADERS.get(path, ()))
        else:
            self.send_error(404)

    def answer(self, body: bytes, headers=(), length: int | None = None, status: int = 200) -> None:
        """Send a response."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def redirect(self, target: str) -> None:
        self.answer(b"", [("Location", target)], status=302)

    def trouble_forbidden(self) -> None:
        self.send_error(403)

    def trouble_gone(self) -> None:
        self.send_error(410)

    def trouble_unavailable(self) -> None:
        self.send_error(503)

    def trouble_flaky(self) -> None:
        self.send_error(500) if self.seen == 1 else self.answer(images()["/flaky.jpg"])

    def trouble_busy(self) -> None:
        self.send_error(429) if self.seen == 1 else self.answer(images()["/busy.jpg"])

    def trouble_mended(self) -> None:
        self.answer(images()["/mended.jpg"]) if self.server.mended else self.send_error(502)

    def trouble_redirect(self) -> None:
        self.redirect("/jpeg/900.jpg")

    def trouble_hops(self) -> None:
        """/hops/5 leads to an image after five redirects."""
        left = int(self.path.rpartition("/")[2])
        self.redirect("/redirect5.jpg" if left == 1 else f"/hops/{left - 1}")

    def trouble_loop(self) -> None:
        self.redirect("/loop")

    def trouble_file(self) -> None:
        self.redirect("file:///etc/hostname")

    def trouble_ftp(self) -> None:
        self.redirect("ftp://127.0.0.1/image.jpg")

    def trouble_inside(self) -> None:
        """To the loopback address, whatever address the server has."""
        self.redirect(f"http://127.0.0.1:{self.server.port}/jpeg/901.jpg")

    def trouble_html(self) -> None:
        self.answer(b"<!doctype html><p>not here any more", [("Content-Type", "image/jpeg")])

    def trouble_gzip(self) -> None:
        self.answer(gzip.compress(jpeg(910)), [("Content-Encoding", "gzip")])

    def trouble_deflate(self) -> None:
        """Without the header of zlib, as some servers send it."""
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(jpeg(911)) + packer.flush()
        self.answer(body, [("Content-Encoding", "deflate")])

    def trouble_swollen(self) -> None:
        """A few kilobytes that are more than the limit when decompressed."""
        self.answer(gzip.compress(bytes(LIMIT + 1)), [("Content-Encoding", "gzip")])

    def trouble_brotli(self) -> None:
        self.answer(jpeg(912), [("Content-Encoding", "br")])

    def trouble_packed(self) -> None:
        self.answer(gzip.compress(jpeg(913)))

    def trouble_drawing(self) -> None:
        self.answer(b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="http://www.w3.org/2000/svg"/>')

    def trouble_answer(self) -> None:
        self.answer(b'{"error": "gone"}')

    def trouble_paper(self) -> None:
        self.answer(b"%PDF-1.7\n%%EOF")

    def trouble_nocontent(self) -> None:
        self.answer(b"", status=204)

    def trouble_small(self) -> None:
        self.answer(encode(picture(920, (40, 8)), "PNG"))

    def trouble_wide(self) -> None:
        self.answer(encode(picture(921, (400, 12)), "JPEG"))

    def trouble_short(self) -> None:
        self.answer(jpeg(902)[:1000], length=len(jpeg(902)))

    def trouble_truncated(self) -> None:
        self.answer(jpeg(903)[:300])

    def trouble_zero(self) -> None:
        self.answer(b"")

    def trouble_bomb(self) -> None:
        self.answer(bomb())

    def trouble_huge(self) -> None:
        self.answer(b"", length=LIMIT + 1)

    def trouble_endless(self) -> None:
        """No length is stated; ends well above the limit."""
        self.send_response(200)
        self.end_headers()
        for _ in range(4 * LIMIT >> 16):
            self.wfile.write(bytes(1 << 16))

    def trouble_drip(self) -> None:
        """Never silent for longer than a socket timeout."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.closing.wait(0.3):
            self.wfile.write(b".")
            self.wfile.flush()

    def trouble_hang(self) -> None:
        self.server.closing.wait(60)

    def trouble_reset(self) -> None:
        """Close with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def trouble_nohttp(self) -> None:
        """No HTTP at all; img2dataset would store these words as the reason."""
        self.wfile.write(b"success")

    def log_message(self, *arguments) -> None:
        """Quiet."""


_LOCK = threading.Lock()


@contextmanager
def serve(host: str = "127.0.0.1", delay: float = 0.0) -> Iterator[Server]:
    """A running server; `delay`: seconds before each answer."""
    server = Server(host, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with serve() as running:
        print(running.url(""), flush=True)
        sys.stdin.read()

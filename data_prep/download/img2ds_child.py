"""Runs img2dataset for img2ds.py, with a urllib opener that public lists need.

    python -P data_prep/download/img2ds_child.py CONFIG.json

img2dataset starts its workers by `spawn`, which runs the top-level code of this script in each
of them again: that is how the opener, the limits and the tie to the parent reach the workers.
img2dataset fetches by `urllib.request.urlopen(request, timeout=...)` and stores the text of an
exception as the reason, so the refusals here have short fixed texts (`reasons.py` beside this).
"""

import ctypes
import http.client
import io
import json
import os
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import urllib.response
from functools import partial
from pathlib import Path

# Last, so that nothing of the repository hides an installed package (hence -P, too).
sys.path.append(str(Path(__file__).resolve().parents[2]))

from data_prep.download.img2ds_address import is_public, unusable
from data_prep.download.img2ds_body import NoImage, decompress, name_other

PARENT = "IMG2DS_PARENT"
OPT_OUT = "Use of image disallowed by X-Robots-Tag directive"  # img2dataset's own words
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_HEADER_BYTES = 1 << 16
_MAY_PASS = {408, 425, 429}  # client errors that may be gone at the next try


class Refused(OSError):
    """An address or an answer that we do not want. The message is the reason that is counted."""


class _Try(threading.local):
    """What the current thread is fetching: img2dataset fetches one image a thread at a time."""

    url: str | None = None
    deadline: float = 0.0
    final: str | None = None  # an answer that another try at once would only repeat

    def left(self, timeout: float) -> float:
        """Seconds that the next socket operation may take; raises `Refused` after the deadline."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self.refusal("too slow")
        return min(timeout, left)

    def refusal(self, reason: str) -> Refused:
        """The error to raise, which also keeps img2dataset's retries from asking again."""
        self.final = reason
        return Refused(reason)


_current = _Try()


def connect(public_only: bool, address: tuple[str, int], timeout: float, source=None):
    """Socket to `address` (host, port); with `public_only`, only to a global unicast address.

    The address that is checked is the one connected to, so a name that resolves differently the
    next time (DNS rebinding) gains nothing. Raises `Refused` or another OSError.
    """
    error: OSError = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    for *_, target in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        if public_only and not is_public(target[0]):
            raise _current.refusal("private address")
        try:
            return socket.create_connection(target[:2], _current.left(timeout), source)
        except Refused:
            raise
        except OSError as failure:
            error = failure
    raise error


class _LimitedSocket(io.RawIOBase):
    """Bytes from a socket, until the deadline of the image or its byte limit."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, limit: int) -> None:
        self._raw, self._sock, self._left = raw, sock, limit
        self._timeout = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        self._sock.settimeout(_current.left(self._timeout))
        try:
            count = self._raw.readinto(buffer)
        except TimeoutError:
            _current.left(self._timeout)  # says "too slow" where the deadline was the limit
            raise
        self._left -= count or 0
        if self._left < 0:
            raise _current.refusal("too large")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response whose header and body are read through `_LimitedSocket`."""

    def __init__(self, limit: int, sock, *arguments, **keywords) -> None:
        super().__init__(sock, *arguments, **keywords)
        self.fp = io.BufferedReader(_LimitedSocket(self.fp.detach(), sock, limit + _HEADER_BYTES))


def _connection(kind, settings: dict, direct: bool, host, timeout, **keywords):
    """An HTTP(S) connection under the limits; `direct`: to the host itself, not to a proxy."""
    connection = kind(host, timeout=timeout, **keywords)
    public_only = direct and not settings["allow_private_addresses"]
    connection._create_connection = partial(connect, public_only)
    connection.response_class = partial(_Response, settings["max_image_bytes"])
    return connection


class _Web(urllib.request.AbstractHTTPHandler):
    """http and https; one TLS context a process (urllib would load the certificates each time)."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, settings: dict) -> None:
        super().__init__()
        self._settings, self._tls = settings, ssl.create_default_context()

    def http_open(self, request):
        return self._fetch(request, http.client.HTTPConnection)

    def https_open(self, request):
        return self._fetch(request, http.client.HTTPSConnection, context=self._tls)

    def _fetch(self, request, kind, **keywords):
        if reason := unusable(request.full_url):
            raise _current.refusal(reason)
        # Behind a proxy the address is the proxy's, and which hosts it may reach is its business.
        direct = not (request.has_proxy() or request._tunnel_host)
        return self.do_open(partial(_connection, kind, self._settings, direct), request, **keywords)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5


class _Local(urllib.request.FileHandler):
    """file: addresses below one folder, links resolved."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def open_local_file(self, request):
        path = Path(urllib.request.url2pathname(request.selector)).resolve()
        if not path.is_relative_to(self._root):
            raise _current.refusal("scheme not allowed outside of the local folder")
        return super().open_local_file(request)


class _Others(urllib.request.BaseHandler):
    def unknown_open(self, request):
        raise _current.refusal("scheme not allowed")


class Opener:
    """What `urllib.request.urlopen` calls.

    `settings`: image_seconds, max_image_bytes, allow_private_addresses, local_root,
    user_agent_token, disallowed_header_directives, started (a file that grows by a byte for each
    image begun: the parent's sign of life and count).
    """

    def __init__(self, settings: dict) -> None:
        self._settings = settings
        self._token = settings["user_agent_token"].strip().lower()
        self._directives = {
            text.strip().lower() for text in settings["disallowed_header_directives"]
        }
        self._started = os.open(settings["started"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._director = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _Web(settings),
            _Redirects(),
            _Others(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            *([_Local(Path(settings["local_root"]))] if settings["local_root"] else []),
        ):
            self._director.add_handler(handler)

    def open(self, request, data=None, timeout=None):
        """Response to a request. img2dataset repeats a failed one at once, whatever the reason;
        what was answered for good is not asked a second time."""
        if request.full_url != _current.url:
            os.write(self._started, b".")
        elif _current.final is not None:
            raise Refused(_current.final)
        _current.url, _current.final = request.full_url, None
        _current.deadline = time.monotonic() + self._settings["image_seconds"]
        try:
            response = self._director.open(request, data, timeout)
        except urllib.error.HTTPError as error:
            if error.code not in _MAY_PASS and error.code < 500:
                _current.final = str(error)
            raise
        except http.client.RemoteDisconnected:
            raise
        except http.client.BadStatusLine:  # its text is the server's, it could read "success"
            raise OSError("bad status line") from None
        with response:
            self._check(response)
            return self._whole(response)

    def _whole(self, response) -> urllib.response.addinfourl:
        """The response with its body read and decompressed; `Refused` if it is surely no image."""
        body, headers, status = response.read(), response.headers, response.status
        if status == 204:
            raise _current.refusal("http 204")
        try:
            encoding = ",".join(headers.get_all("Content-Encoding", []))
            body = decompress(body, encoding, self._settings["max_image_bytes"])
        except NoImage as error:
            raise _current.refusal(str(error)) from None
        if other := name_other(body):
            raise _current.refusal(other)
        return urllib.response.addinfourl(io.BytesIO(body), headers, response.url, status)

    def _check(self, response) -> None:
        """Refuse a body that is announced as too large, and an image whose site opts out."""
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > self._settings["max_image_bytes"]:
            raise _current.refusal("too large")
        if self._directives:
            from img2dataset.downloader import is_disallowed

            if is_disallowed(response.headers, self._token, self._directives):
                raise _current.refusal(OPT_OUT)


def _die_with_parent() -> None:
    """Have the kernel end this process with its parent, so that none outlives a killed one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)  # it died before the call


def _set_up() -> dict:
    """Prepare this process, the main one or a worker; returns the configuration."""
    _die_with_parent()
    os.environ[PARENT] = str(os.getpid())
    config = json.loads(Path(sys.argv[1]).read_bytes())
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for its version
    # webdataset imports torch if it can, and has stand-ins if not. Without it a process takes
    # 184 MB instead of 827 MB (torch 2.14) and starts in half the time.
    sys.modules["torch"] = None
    # OpenCV reads it once, at the first image: more pixels are refused before any is decoded.
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(config["settings"]["max_image_pixels"])
    urllib.request.install_opener(Opener(config["settings"]))
    return config


if __name__ in ("__main__", "__mp_main__"):
    _config = _set_up()
if __name__ == "__main__":
    from img2dataset import download

    download(**_config["img2dataset"])

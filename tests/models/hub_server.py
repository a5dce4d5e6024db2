"""A hub on loopback: the endpoints that huggingface_hub calls to make and fill a repository.

    with serve(tokens={"secret"}) as hub:
        hub.address; hub.repositories["me/model"]["README.md"]; hub.requests

Their forms: huggingface_hub 2.4, hf_api.py, _commit_api.py and lfs.py.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

LARGE = (".safetensors", ".pt")  # what goes the way of large files


class Hub(ThreadingHTTPServer):
    """What it was told: `repositories` are files by path, `requests` are (method, path)."""

    daemon_threads = True

    def __init__(self, tokens: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.full = False  # from then on no repository is made

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(tokens: set[str]) -> Iterator[Hub]:
    """A running hub that knows these tokens."""
    hub = Hub(tokens)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[0] == "blob":  # a signed address, which takes no token
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.server.blobs[parts[1]] = body
            return self._send(200, {})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.tokens:
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self._send(200, {"type": "user", "name": "me", "orgs": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body)["objects"])
        name, action = "/".join(parts[2:4]), parts[4]
        assert name in self.server.repositories
        if action == "preupload":
            modes = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self._send(200, {"files": modes})
        assert action == "commit", path
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if self.server.full:
            return self._send(507, {"error": "Insufficient storage"})
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        answer = {"url": f"{self.server.address}/{name}"}
        return self._send(409 if known else 200, answer | ({"error": "exists"} if known else {}))

    def _validate(self, content: str) -> None:
        _, head, _ = content.split("---\n", 2)
        errors = [] if "license" in yaml.safe_load(head) else [{"message": "no license"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _batch(self, objects: list[dict]) -> None:
        for item in objects:
            place = f"{self.server.address}/blob/{item['oid']}"
            item["actions"] = {"upload": {"href": place, "header": {}}}
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repositories[name][value["path"]] = self.server.blobs[value["oid"]]
        answer = {"commitUrl": f"{self.server.address}/{name}/commit/{'a' * 40}"}
        self._send(200, {**answer, "commitOid": "a" * 40, "success": True})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, code: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

"""The pages: Flask's routes over `opening.Explorer`. What is drawn is in templates/."""

import io
import logging
import secrets
import socket
from collections import OrderedDict

import numpy as np
import torch
from flask import Flask, abort, redirect, render_template, request, send_file, url_for
from PIL import Image
from werkzeug.exceptions import HTTPException, SecurityError
from werkzeug.serving import BaseWSGIServer, make_server

from eval.explorer import confusion
from eval.explorer.answers import Query, answer
from eval.explorer.opening import Explorer
from loaders import views

SIDES = (192, 640)  # pixels of pictures: in a grid, and alone
COUNTS = (24, 96, 384)  # of pictures on a page; each page but the last leads to the next
PAIRS, EXAMPLES = 40, 4  # of confusions on a page, and pictures of each
UPLOADS = 32  # pictures of the visitor that are kept
UPLOAD_BYTES = 32 << 20
# The browser may load nothing from elsewhere, whatever a caption or a class name holds.
POLICY = "default-src 'self'; img-src 'self' data:; form-action 'self'; frame-ancestors 'none'"


def server(explorer: Explorer, bound: socket.socket) -> BaseWSGIServer:
    """A server of the pages at a listening socket; `serve_forever` starts it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = bound.getsockname()
    return make_server(host, port, application(explorer), threaded=True, fd=bound.fileno())


def application(explorer: Explorer) -> Flask:
    """The pages as a WSGI application."""
    app = Flask("eval.explorer")
    # Pages of elsewhere must not reach this server by a name of theirs.
    app.config.update(MAX_CONTENT_LENGTH=UPLOAD_BYTES, TRUSTED_HOSTS=["127.0.0.1", "localhost"])
    pages = _Pages(explorer)
    for rule, function in (
        ("/", pages.start),
        ("/<int:number>/", pages.search),
        ("/<int:number>/picture/<int:sample>-<int:side>.jpg", pages.picture),
        ("/<int:number>/confusions", pages.confusions),
        ("/<int:number>/confusions/<int:model>/<int:label>/<int:said>", pages.confused),
        ("/upload/<name>.jpg", pages.uploaded),
    ):
        app.add_url_rule(rule, function.__name__, function)
    app.add_url_rule("/<int:number>/upload", "upload", pages.upload, methods=["POST"])
    app.register_error_handler(HTTPException, pages.error)
    app.after_request(_headers)
    app.context_processor(lambda: {"explorer": explorer, "sides": SIDES})
    return app


def _headers(response):
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _jpeg(image: Image.Image, side: int) -> io.BytesIO:
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(out, "JPEG", quality=90)
    out.seek(0)
    return out


class _Pages:
    """A method for each route."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self._uploads: OrderedDict[str, tuple[bytes, list]] = OrderedDict()
        self._confusions: dict[tuple[int, int], confusion.Confusions] = {}

    def start(self):
        """The first data set."""
        return redirect(url_for("search", number=0))

    def search(self, number: int):
        """The answers to `text`, `like` (a sample) or `upload`; without any, some pictures."""
        collection = self._collection(number)
        count = self._count()
        query = self._query(number)
        if query is None:
            step = max(1, len(collection) // count)
            shown = range(0, len(collection), step)[:count]
            return render_template("start.html", number=number, here=collection, shown=shown)
        answers = [
            answer(vector, query, collection, index, count)
            for vector, index in zip(query.vectors, self.explorer.indexes[number], strict=True)
        ]
        return render_template(
            "search.html",
            number=number,
            here=collection,
            query=query,
            answers=answers,
            more=self._more(count, len(collection)),
        )

    def upload(self, number: int):
        """Keeps a picture of the visitor and shows what is like it."""
        self._collection(number)
        file = request.files.get("picture")
        if file is None or not file.filename:
            return redirect(url_for("search", number=number))
        try:
            image = views.decode(file.read())
            vectors = [encoder.image(image) for encoder in self.explorer.encoders]
        except views.BadImage as error:
            abort(400, f"{file.filename}: not a picture that can be read ({error})")
        name = secrets.token_hex(8)
        self._uploads[name] = _jpeg(image, SIDES[1]).getvalue(), vectors
        while len(self._uploads) > UPLOADS:
            self._uploads.popitem(last=False)
        return redirect(url_for("search", number=number, upload=name), 303)

    def uploaded(self, name: str):
        """A picture that was uploaded."""
        if name not in self._uploads:
            abort(404, "This picture is no longer kept; upload it again.")
        return send_file(io.BytesIO(self._uploads[name][0]), "image/jpeg")

    def picture(self, number: int, sample: int, side: int):
        """A picture of a data set, at most `side` pixels wide and high."""
        collection = self._collection(number)
        if side not in SIDES or sample >= len(collection):
            abort(404)
        image = collection.image(sample)
        if image is None:
            abort(404, "This picture cannot be read.")
        return send_file(_jpeg(image, side), "image/jpeg", max_age=3600)

    def confusions(self, number: int):
        """The classes that are most often taken for another, with pictures."""
        collection = self._labelled(number)
        columns = []
        for model in range(len(self.explorer.encoders)):
            found = self._confused(number, model)
            pairs = [
                (label, said, count, self._samples(number, model, label, said)[:EXAMPLES])
                for label, said, count in found.pairs[:PAIRS]
            ]
            columns.append((found, pairs))
        return render_template("confusions.html", number=number, here=collection, columns=columns)

    def confused(self, number: int, model: int, label: int, said: int):
        """All pictures of one class that a model takes for another."""
        collection = self._labelled(number)
        known = len(collection.classes)
        if model >= len(self.explorer.encoders) or max(label, said) >= known:
            abort(404)
        found, count = self._samples(number, model, label, said), self._count()
        encoders, indexes = self.explorer.encoders, self.explorer.indexes[number]
        return render_template(
            "confused.html",
            number=number,
            here=collection,
            model=model,
            name=encoders[model].name,
            others=[
                (encoders[other].name, indexes[other].predicted)
                for other in range(len(encoders))
                if other != model
            ],
            label=label,
            said=said,
            found=len(found),
            samples=found[:count].tolist(),
            more=self._more(count, len(found)),
        )

    def error(self, error: HTTPException):
        """What went wrong, in the page's own looks."""
        if isinstance(error, SecurityError):  # of a foreign host there are no addresses to link to
            return error
        page = render_template("error.html", error=error, number=None, here=None)
        return page, error.code

    def _collection(self, number: int):
        if number >= len(self.explorer.collections):
            abort(404)
        return self.explorer.collections[number]

    def _labelled(self, number: int):
        collection = self._collection(number)
        if self.explorer.indexes[number][0].predicted is None:
            abort(404, f"{collection.name} has no labels with class names.")
        return collection

    def _confused(self, number: int, model: int) -> confusion.Confusions:
        key = number, model
        if key not in self._confusions:
            labels = self.explorer.collections[number].labels
            predicted = self.explorer.indexes[number][model].predicted
            self._confusions[key] = confusion.confusions(labels, predicted)
        return self._confusions[key]

    def _samples(self, number: int, model: int, label: int, said: int) -> np.ndarray:
        predicted = self.explorer.indexes[number][model].predicted
        return confusion.samples(self.explorer.collections[number].labels, predicted, label, said)

    def _query(self, number: int) -> Query | None:
        text = request.args.get("text", "").strip()
        like = request.args.get("like", type=int)
        upload = request.args.get("upload")
        if text:
            return Query([e.texts([text])[0] for e in self.explorer.encoders], text=text)
        if like is not None:
            if not 0 <= like < len(self.explorer.collections[number]):
                abort(404)
            images = [index.images[like] for index in self.explorer.indexes[number]]
            rows = [torch.from_numpy(row).float() for row in images]
            return Query(rows, sample=like)
        if upload is not None:
            if upload not in self._uploads:
                abort(404, "This picture is no longer kept; upload it again.")
            return Query(self._uploads[upload][1], upload=upload)
        return None

    def _count(self) -> int:
        given = request.args.get("count", type=int)
        return given if given in COUNTS else COUNTS[0]

    def _more(self, count: int, known: int) -> int | None:
        """The count of the next larger page, None where all is shown."""
        larger = [number for number in COUNTS if number > count]
        return larger[0] if larger and known > count else None

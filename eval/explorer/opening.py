"""From the command line to what the page shows: models, data sets and their indexes."""

import argparse
from dataclasses import dataclass

from eval.explorer.collection import Collection
from eval.explorer.encoder import Encoder
from eval.explorer.index import Index, open_index
from eval.tasks import evaluation


@dataclass(frozen=True)
class Explorer:
    """All that the page shows: `indexes[s][m]` is of the data set `s` and the model `m`."""

    encoders: list[Encoder]
    collections: list[Collection]
    indexes: list[list[Index]]


def explorer(args: argparse.Namespace) -> Explorer:
    """Open the models and sets of `eval.explore`'s arguments, and make what is missing of their
    indexes.

    Raises DataError for a set or checkpoint that cannot be read, ConfigError for templates that
    are unknown and for a model that compares tokens.
    """
    collections = [Collection(folder) for folder in args.data]
    templates = [collection.templates(args.templates) for collection in collections]
    encoders = [Encoder(extractor) for extractor in evaluation.extractors(args)]
    indexes = [
        [open_index(args.output, collection, encoder, texts) for encoder in encoders]
        for collection, texts in zip(collections, templates, strict=True)
    ]
    return Explorer(encoders, collections, indexes)

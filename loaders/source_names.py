"""Names of the sources of a run, which `data.ratios` and messages use: each its own."""

import os
from collections import Counter
from collections.abc import Sequence

from loaders.errors import DataError
from loaders.manifest import ShardSet


def distinguish(sources: Sequence[ShardSet]) -> None:
    """Rename sources that share a name, in place, by the end of their folders' paths.

    /d/imagenet/train and /d/cc3m/train become `imagenet/train` and `cc3m/train`: of each path as
    many last parts as no other source has. A name that is its own stays, because it is part of the
    identity of a checkpoint.

    Raises:
        DataError: two sources with one name are in the same folder.
    """
    times = Counter(source.name for source in sources)
    alike = [source for source in sources if times[source.name] > 1]
    # Not resolved: a link is a way to give a set another name.
    paths = [os.path.abspath(source.folder).strip(os.sep).split(os.sep) for source in alike]
    taken = {source.name for source in sources if times[source.name] == 1}
    for source, path in zip(alike, paths, strict=True):
        others = [other for other in paths if other is not path]
        if path in others:
            raise DataError(
                f"two sources are both named {source.name} and lie in {source.folder}; join their "
                "tars by :: to one source, or reach one of them through a link of another name"
            )
        for count in range(1, len(path) + 1):
            tail = "/".join(path[-count:])
            if tail not in taken and all(other[-count:] != path[-count:] for other in others):
                break
        source.name = tail

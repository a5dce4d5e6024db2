"""Download a YFCC15M list into tar shards. Three lists go by that name; each is named here.

    openai   14,829,396 photos: yfcc100m_subset_data.tsv.bz2 (github.com/openai/CLIP,
             data/yfcc100m.md). The set that papers call YFCC-14M, or YFCC15M.
    slip     14,689,580 of those: the ones whose line is in flickr_unique_ids.npy, the images that
             SLIP's authors had (github.com/facebookresearch/SLIP, make_dataset.py).
    declip   15,388,848 photos, "V2": yfcc15m_clean_open_data.json (github.com/Sense-GVT/DeCLIP).
             Only 6,642,077 of them are in OpenAI's list (issue 28 there).

    python data_prep/yfcc.py --list openai --ids yfcc100m_subset_data.tsv.bz2 \\
        --metadata yfcc100m_dataset.sql --captions title_description --images bucket --out D

Captions (openai, slip): `title`; `description`; `title_description`, both joined by ". " as the
loader of OTTER does, or the one there is; `random`, one of those there are, chosen by the photo
id. Cleaned: URL-decoded, html tags and links removed, white space joined. Photos without a caption
are dropped and counted. DeCLIP's captions come from its file, white space joined.
Images: `bucket`, the open-data copy of multimedia-commons; `urls`, Flickr; or a folder that has
HHH/HHH/HASH.jpg like data/images of the bucket. The same command continues an interrupted download.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives import yfcc_lists, yfcc_metadata
from data_prep.download import list_set, url_list
from data_prep.download.list_rows import WEB
from loaders.errors import run_cli
from loaders.manifest import CAPTION_LINES
from loaders.specs import as_path, local


def parse_arguments() -> tuple[argparse.Namespace, yfcc_lists.Job]:
    """The command line. Raises `ConfigError` for flags that do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", choices=yfcc_lists.LISTS, required=True, help="which list --ids is"
    )
    parser.add_argument("--ids", type=as_path, required=True, help="file of the list as published")
    parser.add_argument("--unique-ids", type=as_path, help="slip: flickr_unique_ids.npy")
    parser.add_argument("--metadata", type=as_path, help="YFCC100M, SQLite or TSV (openai, slip)")
    parser.add_argument(
        "--captions", choices=yfcc_metadata.CAPTIONS, help="caption rule (openai, slip)"
    )
    parser.add_argument("--images", type=local, required=True, help="bucket, urls, or a folder")
    parser.add_argument("--expected-rows", type=int, help="photos of a part of the list")
    parser.add_argument("--name", help="name of the set (default: of the list)")
    list_set.add_arguments(parser)
    given = parser.parse_args()
    job = yfcc_lists.Job(
        given.list,
        given.ids,
        given.unique_ids,
        given.metadata,
        given.captions,
        given.images,
        given.expected_rows or yfcc_lists.LISTS[given.list].photos,
    )
    return given, job


def main() -> None:
    """Command line: build the list, begin the set, download."""
    given, job = parse_arguments()
    options = list_set.check(given, job.local_root)
    index = url_list.build(
        given.out,
        job.read_rows,
        job.inputs,
        {"list": job.list_name, "captions": job.captions, "images": job.place},
        given.samples_per_shard,
        yfcc_lists.EXTRA_COLUMNS,
        WEB if job.local_root is None else ("file",),
    )
    yfcc_lists.check_count(job, index["facts"])
    published = yfcc_lists.LISTS[job.list_name]
    about = {
        "tool": "data_prep/yfcc.py",
        "name": given.name or published.name,
        "source": published.source,
        "license": yfcc_lists.LICENSE,
    }
    identity = {"list": job.list_name, **index["facts"]}
    stated = {**identity, "captions": job.captions, "images": job.place}
    print(f"{job.list_name}: {identity['ids']} photo ids, sha256 {identity['ids_sha256']}")
    extra = {CAPTION_LINES: True} if job.list_name == "declip" else {}
    list_set.download(given, options, index, about, identity, stated, extra)


if __name__ == "__main__":
    run_cli(main)

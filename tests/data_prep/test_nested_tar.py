"""The index of class archives and class folders, against tarfile; damaged and strange sources."""

import bz2
import gzip
import io
import lzma
import os
import random
import signal
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.archives import image_table
from data_prep.archives.nested_tar import index, open_images
from loaders.errors import DataError
from tests.data_prep import imagenet_layout as layout

CLASSES = [f"n{i:08d}" for i in (7, 3, 11)]
IMAGES = {
    c: {f"{c}_{k}.JPEG": b"%s %d" % (c.encode(), k) * (k * 99 + 1) for k in (10, 9, 2)}
    for c in CLASSES
}
SORTED = [(c, name, IMAGES[c][name]) for c in sorted(IMAGES) for name in sorted(IMAGES[c])]


def content(images):
    """(class, name, bytes) of every image of an index."""
    return [(images.groups[images.rows["group"][i]], *images.read(i)) for i in range(len(images))]


def write(path, data):
    path.write_bytes(data)
    return path


def archive(path, images=None, form=tarfile.GNU_FORMAT):
    return write(path, layout.train_tar(images or IMAGES, form=form))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_tars(tmp_path, form):
    images = index(archive(tmp_path / "a.tar", form=form))
    assert images.groups == tuple(sorted(CLASSES))
    assert content(images) == SORTED
    assert images.counts().tolist() == [3, 3, 3]
    assert images.rows.dtype.itemsize == 14
    assert images.names is None


def test_all_forms_have_one_digest(tmp_path):
    (tmp_path / "tars").mkdir()
    for name, files in IMAGES.items():
        write(tmp_path / "tars" / f"{name}.tar", layout.pack(files))
    folders = layout.unpack(IMAGES, tmp_path / "folders")
    sources = [archive(tmp_path / "a.tar"), tmp_path / "tars", folders]
    found = [index(source) for source in sources]
    assert [content(images) for images in found] == [SORTED] * 3
    assert len({images.digest for images in found}) == 1
    (folders / CLASSES[0] / f"{CLASSES[0]}_9.JPEG").write_bytes(b"other size")
    assert index(folders).digest != found[0].digest


def test_images_without_classes(tmp_path):
    files = {f"deep/{name}": data for _, name, data in reversed(SORTED)}
    (tmp_path / "flat").mkdir()
    for _, name, data in SORTED:
        write(tmp_path / "flat" / name, data)
    expected = sorted(("", name, data) for _, name, data in SORTED)
    for source in (write(tmp_path / "a.tar", layout.pack(files)), tmp_path / "flat"):
        images = index(source)
        assert images.groups == ("",)
        assert content(images) == expected
        assert images.misplaced == (0,)


def add_folder(tar, name):
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(info)


def test_a_tar_that_tarfile_packs_itself(tmp_path):
    """Folders, times with fractions (pax records), links and owners are passed over."""
    folders = layout.unpack(IMAGES, tmp_path / "in")
    with tarfile.open(tmp_path / "a.tar", "w") as outer:
        add_folder(outer, "whole/")
        for name in CLASSES:
            path = folders / name
            os.utime(path / f"{name}_9.JPEG", (1.5, 1.5))
            (path / "link.JPEG").symlink_to(f"{name}_9.JPEG")
            inner = tmp_path / f"{name}.tar"
            with tarfile.open(inner, "w", format=tarfile.PAX_FORMAT) as tar:
                tar.add(path, ".")
            outer.add(inner, f"whole/{name}.tar")
            (path / "link.JPEG").unlink()
    assert content(index(tmp_path / "a.tar")) == SORTED


def test_a_link_has_no_data_whatever_its_size(tmp_path):
    """Old tars state the size of the file that a hard link means."""
    name = CLASSES[0]
    link = tarfile.TarInfo("link.JPEG")
    link.type, link.linkname, link.size = tarfile.LNKTYPE, f"{name}_2.JPEG", 700
    inner = link.tobuf(tarfile.USTAR_FORMAT) + layout.pack(IMAGES[name])
    path = write(tmp_path / "a.tar", layout.pack({f"{name}.tar": inner}))
    assert content(index(path)) == [row for row in SORTED if row[0] == name]


@given(
    st.dictionaries(
        st.integers(0, 10**8 - 1).map("n{:08d}".format),
        st.dictionaries(st.integers(0, 99999), st.binary(max_size=1200), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_any_archive_reads_as_tarfile_does(tmp_path_factory, classes, shuffle):
    images = {
        c: {f"{c}_{k}.JPEG": data for k, data in shuffle.sample(sorted(files.items()), len(files))}
        for c, files in shuffle.sample(sorted(classes.items()), len(classes))
    }
    path = archive(tmp_path_factory.mktemp("any") / "a.tar", images)
    expected = []
    with tarfile.open(path) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                name = member.name.removesuffix(".tar")
                expected += [(name, m.name, inner.extractfile(m).read()) for m in inner]
    assert content(index(path)) == sorted(expected)


def test_other_files_are_named(tmp_path):
    folders = layout.unpack(IMAGES, tmp_path / "in")
    for name in ("wnid.txt", ".hidden.JPEG", "b.jpg.part"):
        write(folders / CLASSES[0] / name, b"")
    images = index(folders)
    assert sorted(images.ignored) == [f"{CLASSES[0]}/b.jpg.part", f"{CLASSES[0]}/wnid.txt"]
    assert content(images) == SORTED
    with tarfile.open(archive(tmp_path / "a.tar"), "a") as tar:
        info = tarfile.TarInfo("readme.txt")
        tar.addfile(info)
    assert index(tmp_path / "a.tar").ignored == ("readme.txt",)


def test_images_named_for_another_class_are_counted(tmp_path):
    images = {c: dict(files) for c, files in IMAGES.items()}
    images[CLASSES[0]][f"{CLASSES[1]}_5.JPEG"] = b"x"
    images[CLASSES[0]]["unnumbered.JPEG"] = b"x"
    found = index(archive(tmp_path / "a.tar", images))
    assert dict(zip(found.groups, found.misplaced, strict=True)) == {
        CLASSES[0]: 1,
        CLASSES[1]: 0,
        CLASSES[2]: 0,
    }


def test_only_some_classes(tmp_path):
    for source in (archive(tmp_path / "a.tar"), layout.unpack(IMAGES, tmp_path / "in")):
        whole = index(source)
        chosen = [CLASSES[2], CLASSES[0]]  # not the first of the sorted ones
        images = whole.only(chosen)
        assert images.groups == tuple(sorted(chosen))
        assert content(images) == [row for row in SORTED if row[0] in chosen]
        assert images.digest == whole.digest
        assert content(whole) == SORTED
        assert len(whole.only([])) == 0


@pytest.mark.parametrize(
    ("packer", "name", "command"),
    [
        (gzip.compress, "a.tar.gz", "gunzip -k"),
        (bz2.compress, "a.tar.bz2", "bunzip2 -k"),
        (lzma.compress, "a.tar.xz", "unxz -k"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "a.tar.zst", "unzstd"),
        (lambda data: b"PK\x03\x04" + data, "a.zip", "unzip"),
    ],
)
def test_a_compressed_archive_is_refused_with_the_command(tmp_path, packer, name, command):
    path = write(tmp_path / name, packer(layout.train_tar(IMAGES)))
    with pytest.raises(DataError, match=f"unpack it once: {command} {path}"):
        index(path)


def test_compressed_class_archives_are_refused(tmp_path):
    classes = {f"{c}.tar": gzip.compress(layout.pack(files)) for c, files in IMAGES.items()}
    path = write(tmp_path / "a.tar", layout.pack(classes))
    with pytest.raises(DataError, match=r"class archive 'n00000003.tar': .*: compressed; unpack"):
        index(path)


def test_every_cut_is_found(tmp_path):
    """Wherever the archive ends, it is refused, and the message names a member and a byte."""
    data = layout.train_tar(IMAGES)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    used = members[-1].offset_data + -(-members[-1].size // 512) * 512
    cuts = [*range(1, used, 2048), used - 1, used]
    for cut in cuts:
        path = write(tmp_path / "a.tar", data[:cut])
        with pytest.raises(DataError, match="truncated") as error:
            index(path)
        last = [m for m in members if m.offset_data < cut]
        if last and cut < last[-1].offset_data + last[-1].size:
            assert last[-1].name in str(error.value)
            end = last[-1].offset_data + last[-1].size
            assert f"ends at byte {end} but the file has {cut}" in str(error.value)
    assert len(index(write(tmp_path / "a.tar", data))) == 9


def test_a_class_archive_that_was_cut_before_packing(tmp_path):
    name = CLASSES[0]
    inner = layout.pack(IMAGES[name])
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        ends = [(m.name, m.offset_data, m.offset_data + m.size) for m in tar]
    for member, start, end in ends:
        for cut in (start, (start + end) // 2):
            path = write(tmp_path / "a.tar", layout.pack({f"{name}.tar": inner[:cut]}))
            with pytest.raises(DataError, match=f"class archive '{name}.tar': cut short") as error:
                index(path)
            # The class archive is the first member: its data starts at 512.
            assert (
                f"member {member!r} ends at byte {512 + end} of the file, but the class archive "
                f"at byte {512 + cut}"
            ) in str(error.value)
        path = write(tmp_path / "a.tar", layout.pack({f"{name}.tar": inner[: start - 300]}))
        with pytest.raises(DataError, match=r"damaged after .*truncated header"):
            index(path)


def test_damage_is_found_with_its_byte(tmp_path):
    data = bytearray(layout.train_tar(IMAGES))
    with tarfile.open(fileobj=io.BytesIO(data)) as outer:
        first = outer.getmembers()[0]
        with tarfile.open(fileobj=outer.extractfile(first)) as inner:
            at = first.offset_data + inner.getmembers()[1].offset
    data[at + 3] ^= 1
    path = write(tmp_path / "a.tar", data)
    words = f"at byte {at} of the file: damaged after member '{CLASSES[0]}_10"
    with pytest.raises(DataError, match=words):
        index(path)


def long_name(path):
    return path.write_bytes(layout.pack({f"{CLASSES[0]}.tar": layout.pack({"a" * 120: b"x"})}))


def pax_name(path):
    inner = layout.pack({"é" * 80 + ".JPEG": b"x"}, tarfile.PAX_FORMAT)
    return path.write_bytes(layout.pack({f"{CLASSES[0]}.tar": inner}))


def device(path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("x.JPEG")
        info.type = tarfile.CHRTYPE
        tar.addfile(info)
    return path.write_bytes(layout.pack({f"{CLASSES[0]}.tar": buffer.getvalue()}))


@pytest.mark.parametrize("make", [long_name, pax_name, device])
def test_what_the_official_archives_do_not_have(tmp_path, make):
    make(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"at byte 512 of the file: a long name or a special file"):
        index(tmp_path / "a.tar")


def test_names_that_occur_twice(tmp_path):
    name = CLASSES[0]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo(f"{name}_1.JPEG"))
    path = write(tmp_path / "a.tar", layout.pack({f"{name}.tar": inner.getvalue()}))
    with pytest.raises(DataError, match=f"{name}/{name}_1.JPEG occurs twice"):
        index(path)
    classes = {f"{folder}/{name}.tar": layout.pack(IMAGES[name]) for folder in "ab"}
    with pytest.raises(DataError, match=f"class '{name}' occurs twice"):
        index(write(tmp_path / "b.tar", layout.pack(classes)))


def test_folders_that_mix_forms(tmp_path):
    source = layout.unpack(IMAGES, tmp_path / "in")
    write(source / "x.tar", layout.pack({}))
    with pytest.raises(DataError, match="holds 1 class archives and 3 class folders"):
        index(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds nothing of use"):
        index(tmp_path / "empty")
    with pytest.raises(DataError, match="No such file"):
        index(tmp_path / "none")
    with pytest.raises(DataError, match="empty file, not a tar"):
        index(write(tmp_path / "e.tar", b""))


def test_a_source_that_changes_later_is_noticed(tmp_path):
    folders = layout.unpack(IMAGES, tmp_path / "in")
    images, path = index(folders), folders / CLASSES[1] / f"{CLASSES[1]}_10.JPEG"
    size = path.stat().st_size
    path.write_bytes(b"short")
    with pytest.raises(DataError, match=f"{path}: 5 bytes, but {size} when it was indexed"):
        images.read(0)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file"):
        images.read(0)
    tar = archive(tmp_path / "a.tar")
    images = index(tar)
    os.truncate(tar, images.rows["offset"].max() + 1)
    images.read(0)
    with pytest.raises(DataError, match="shorter than when it was indexed"):
        images.read(int(images.rows["offset"].argmax()))


def test_the_index_is_kept_until_the_source_changes(tmp_path):
    source, out = archive(tmp_path / "a.tar"), tmp_path / "out"
    assert content(open_images(source, out)) == SORTED
    kept = out / "work" / "images.npz"
    before = kept.stat().st_mtime_ns
    assert content(open_images(source, out)) == SORTED
    assert kept.stat().st_mtime_ns == before
    images = {c: dict(list(files.items())[:2]) for c, files in IMAGES.items()}
    archive(source, images)
    assert len(open_images(source, out)) == 6
    for damage in (b"", b"PK\x03\x04", kept.read_bytes()[:-30]):
        kept.write_bytes(damage)
        assert len(open_images(source, out)) == 6
    folders = layout.unpack(IMAGES, tmp_path / "in")
    assert content(open_images(folders, out)) == SORTED
    assert content(open_images(folders, out)) == SORTED
    assert image_table.load(kept, "another state") is None
    write(folders / CLASSES[0] / "n.JPEG", b"x")
    assert len(open_images(folders, out)) == 10


def test_one_process_indexes_and_the_others_wait(tmp_path):
    source = archive(tmp_path / "a.tar")
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            try:
                same = content(open_images(source, tmp_path / "out")) == SORTED
                os._exit(0 if same else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * 6
    assert not list((tmp_path / "out" / "work").glob("*.tmp"))


def test_a_folder_of_someone_else_gets_no_index(tmp_path):
    out = tmp_path / "photos"
    out.mkdir()
    write(out / "me.jpg", b"x")
    with pytest.raises(DataError, match=r"not empty \(me.jpg\)"):
        open_images(archive(tmp_path / "a.tar"), out)
    assert [p.name for p in out.iterdir()] == ["me.jpg"]


def test_members_of_a_sample(tmp_path):
    picture = layout.picture(1)
    images = index(archive(tmp_path / "a.tar", {c: {f"{c}_1.JPEG": picture} for c in CLASSES}))
    read = image_table.sample_reader(images, np.array([2, 0, 1]), ["a", "b", "c"], "x/{synset}")
    assert read(0) == {
        "jpg": picture,
        "cls": b"2",
        "json": b'{"label": 2, "synset": "c", "source": "x/c"}',
    }
    assert list(read(0)) == ["jpg", "cls", "json"]


def test_a_kill_while_indexing_leaves_no_half_index(tmp_path):
    source, out = archive(tmp_path / "a.tar"), tmp_path / "out"
    for delay in random.Random(0).sample(range(20), 8):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, 0.0002 * (delay + 1))
            open_images(source, out)
            os._exit(0)
        os.waitpid(child, 0)
        assert content(open_images(source, out)) == SORTED
        for path in (out / "work").glob("images.npz"):
            path.unlink()

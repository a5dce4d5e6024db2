"""Names of files and folders: which are those of images, and which no person gave."""

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm",
)  # fmt: skip
# Names, in small letters, that systems and file servers leave in folders of images. Those that
# begin with a dot are hidden everywhere and need not stand here.
SYSTEM = frozenset(
    (
        "__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
        "system volume information", "lost+found", "__pycache__", "thumbs.db", "desktop.ini",
    )
)  # fmt: skip


def is_image(name: str) -> bool:
    """Whether a file is named as an image, in small or capital letters."""
    return name.lower().endswith(IMAGE_SUFFIXES)

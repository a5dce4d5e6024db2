"""YAML that another person may have written, such as the `config.yaml` of a downloaded run.

PyYAML's safe loader builds nothing but plain values. Refused besides is what is small in the file
and large in memory: aliases, which stand for gigabytes once they are merged or printed.
"""

from pathlib import Path

import yaml

MAX_BYTES = 1 << 17


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases; raises `YAMLError` that names the line."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """The next node; called by PyYAML for every value."""
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(
                f"{where}: the alias *{event.anchor}: a few lines of them can stand for gigabytes; "
                "write the value out, or refer to it as ${section.key}"
            )
        if "python/" in (getattr(event, "tag", None) or ""):
            raise yaml.YAMLError(f"{where}: the object tag {event.tag}; write a plain value")
        return super().compose_node(parent, index)


def read_text(path: Path) -> str:
    """The characters of a file.

    Raises:
        OSError: no such file. ValueError: not a regular file, too large, or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # a device or pipe would be read for ever
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    return path.read_text(encoding="utf-8")

"""Looks at a YAML file before the parser does: nothing in it may name code, refer to itself, or unfold without end.

A few lines of YAML can stand for billions of values, because a reference costs nothing to write. Parsers keep such
values shared; comparing, copying or printing them does not.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from yaml.resolver import BaseResolver

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DIGITS = 100
_PLAIN_TAGS = BaseResolver.DEFAULT_SCALAR_TAG.removesuffix("str")
_INTEGER_TAG = _PLAIN_TAGS + "int"
_CODE_TAGS = _PLAIN_TAGS + "python/"


def check_yaml_file(path: Path) -> None:
    """A file of settings is one small document of plain values, with names at the top.

    Raises:
        ValueError: it is not; the message names the file and the place.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes, too many for settings")
    try:
        root = yaml.compose(data.decode("utf-8"), Loader=yaml.SafeLoader)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for settings") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold settings, one `name: value` on a line")
    if any(key.value == "config" for key, _ in root.value):
        raise ValueError(f"{path}: a file cannot name another by `config`; give --config several times")
    _Counter(path).count(root)


class _Counter:
    """Counts the values of a document as if every reference were written out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def count(self, node: yaml.Node) -> int:
        """Values in `node`. Raises ValueError."""
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        where = f"{self._path}, line {node.start_mark.line + 1}"
        if id(node) in self._open:
            raise ValueError(f"{where}: a value refers to itself; write it out")
        if node.tag.startswith(_CODE_TAGS) or not node.tag.startswith(_PLAIN_TAGS):
            raise ValueError(f"{where}: the tag {node.tag!r} is refused: settings are plain values; leave it out")
        if node.tag == _INTEGER_TAG and len(node.value) > MAX_DIGITS:
            raise ValueError(f"{where}: a number of {len(node.value)} digits; no setting is so large")
        self._open.add(id(node))
        size = 1 + sum(self.count(child) for child in _children(node))
        self._open.remove(id(node))
        if size > MAX_VALUES:
            raise ValueError(f"{where}: unfolds to more than {MAX_VALUES:,} values; settings need no such references")
        self._sizes[id(node)] = size
        return size


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []

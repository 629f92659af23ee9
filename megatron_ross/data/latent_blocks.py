"""What a latent cache knows about the images it was made from, so that it can be mended and is not taken for whole.

Besides the moments (`latent_cache.py`) a cache folder holds two kinds of JSON files. A block's, `<block>.json`, lists
its images: name, state of the file, digest, and what is wrong with those that have no moments. A data set's,
`set-<key>.json`, says whether all of its blocks were walked through, and which images are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_ross.data.errors import SampleError
from megatron_ross.data.records import Record
from megatron_ross.text_files import replace_text

_SAMPLED_RECORDS = 64
MAX_LISTED = 10_000
"""Missing images that a data set's file lists; all of them are counted."""


class Records(Protocol):
    """A data set as far as its key needs it."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record: ...


@dataclass(frozen=True)
class CachedImage:
    """An image of a block: `stamp` is the state of its file (see `ImageSpan.stamp`), `digest` the hex digest of its
    bytes, empty if they could not be read, and `problem` why it has no moments, empty if it has them."""

    name: str
    stamp: str
    digest: str
    problem: str


@dataclass(frozen=True)
class MissingImage:
    """An image without moments: its sample and number there, and what is wrong with it."""

    sample: int
    number: int
    problem: str


@dataclass
class Coverage:
    """How much of a data set is in a cache.

    Attributes:
        data: path of its records, for messages.
        seq_length: longer samples were cut there, and their images behind the cut are not cached.
        is_finished: all blocks were walked through; false while the tool is at work, and after it was stopped.
        num_missing: images without moments; `missing` lists the first MAX_LISTED.
    """

    data: str
    seq_length: int
    is_finished: bool = False
    num_images: int = 0
    num_missing: int = 0
    missing: list[MissingImage] = field(default_factory=list)

    def is_beyond(self, max_bad_share: float) -> bool:
        """More images are missing than training may skip."""
        return self.num_missing > max_bad_share * self.num_images


def block_path(folder: Path, start: int, names: Sequence[str]) -> Path:
    """The list of a block that starts at sample `start` and has images of these names."""
    digest = hashlib.blake2b(repr([start, *names]).encode(), digest_size=12).hexdigest()
    return folder / f"{digest}.json"


def read_block(path: Path) -> list[CachedImage]:
    """Images in the order of the block; nothing if it was never cached.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, list):
            raise TypeError("it must hold a list")
        return [CachedImage(*entry) for entry in entries]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run tools/cache_latents.py again") from None


def write_block(path: Path, images: Sequence[CachedImage]) -> None:
    """Write a block's list, all at once."""
    replace_text(path, json.dumps([dataclasses.astuple(image) for image in images]) + "\n")


def coverage_path(folder: Path, dataset: Records) -> Path:
    """Where the coverage of a data set is. The name depends on what records say, wherever the files lie."""
    size = len(dataset)
    places = sorted({i * size // _SAMPLED_RECORDS for i in range(_SAMPLED_RECORDS)})
    hashed = hashlib.blake2b(f"{size}".encode(), digest_size=12)
    for index in places:
        hashed.update(_content(dataset, index).encode())
    return folder / f"set-{hashed.hexdigest()}.json"


def _content(dataset: Records, index: int) -> str:
    try:
        record = dataset.record(index)
    except SampleError:
        return "broken"
    return repr((record.images, [(turn.role, turn.text) for turn in record.turns]))


def read_coverage(path: Path) -> Coverage | None:
    """None: the cache was not made for this data set, or by a version that did not write it down.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        return Coverage(**{**stored, "missing": [MissingImage(*entry) for entry in stored["missing"]]})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run tools/cache_latents.py again") from None


def write_coverage(path: Path, coverage: Coverage) -> None:
    """Write a data set's coverage, all at once."""
    listed = [dataclasses.astuple(image) for image in coverage.missing[:MAX_LISTED]]
    replace_text(path, json.dumps(vars(coverage) | {"missing": listed}, indent=1) + "\n")

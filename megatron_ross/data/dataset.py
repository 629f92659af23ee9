"""A data set: record -> tokenised sample with images expanded to spans of placeholder tokens.

Nothing is tokenised before it is asked for, and no image is decoded before `ImageSpan.load_pixels` is called, so that
each rank decodes only the images it needs.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID, MAX_IMAGES_PER_SAMPLE
from megatron_ross.data.batch import ImageSpan, RossSample
from megatron_ross.data.conversation import TEMPLATES, EncodedConversation, encode_conversation, encode_question
from megatron_ross.data.errors import ConversationError, ImageError, RecordError
from megatron_ross.data.formats import has_image, word_count
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.records import Record, parse_record
from megatron_ross.data.sources import PathLike, Source, open_sources
from megatron_ross.data.tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Sizes of one sample."""

    num_tokens: int
    num_supervised: int
    num_images: int
    num_images_cut: int
    mismatch: bool


@dataclasses.dataclass(frozen=True)
class Room:
    """Tokens of a sample up to the end of its first image, and up to its first supervised token; None: it has none."""

    image: int | None
    answer: int | None


_ANY_LENGTH = 2**62


class RossDataset:
    """Random access to the samples of JSON, JSONL and parquet files and WebDataset shards, one after the other."""

    def __init__(
        self,
        json_path: PathLike | Sequence[PathLike],
        image_root: PathLike | None,
        tokenizer: Any,
        template: str,
        image_processor: ImageProcessor,
        num_image_tokens: int,
        max_length: int,
        reference: bool = False,
        cache_folder: Path | None = None,
        allow_image_symlinks: bool = False,
        supervise: bool = True,
    ):
        """
        Args:
            json_path: JSON, JSONL, parquet or tar files; local paths or URLs; names may hold a range, "{000..099}.tar".
            image_root: folder (or URL) that the records' image names start from; None if no record names a file.
            tokenizer: a Hugging Face tokenizer or a TextTokenizer.
            template: one of `conversation.TEMPLATES`.
            num_image_tokens: tokens per image.
            max_length: longer samples are cut; never inside an image, the cut then moves before it.
            reference: exactly the published ids and labels (literal padding tokens are removed, too).
            cache_folder: for indices of large files; None takes `index.default_cache_folder()`.
            allow_image_symlinks: follow symbolic links out of `image_root`.
            supervise: False gives no token a label, and takes records without an answer, or with images alone.

        Raises:
            ValueError: a file or the image folder is missing or unreadable, or a setting is impossible.
        """
        if template not in TEMPLATES:
            raise ValueError(f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")
        if max_length < 1 or num_image_tokens < 1:
            raise ValueError(
                f"seq_length={max_length}: must be positive, and so must the tokens of an image ({num_image_tokens})"
            )
        self.name = ", ".join(map(str, [json_path] if isinstance(json_path, str | os.PathLike) else json_path))
        """The files of its records, for messages."""
        self._image_root = image_root
        self._sources = open_sources(json_path, image_root, cache_folder, allow_image_symlinks)
        self._ends = list(itertools.accumulate(len(source) for source in self._sources))
        self._tokenizer = tokenizer if isinstance(tokenizer, TextTokenizer) else TextTokenizer(tokenizer)
        self._template = template
        self._num_image_tokens = num_image_tokens
        self.max_length = max_length
        self._reference = reference
        self.supervise = supervise
        self.image_processor = image_processor

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> RossSample:
        """
        Raises:
            IndexError: no such sample.
            SampleError: the record is malformed or does not fit the template.
        """
        record = self.record(index)
        encoded = self._encode(record)
        if self._reference:
            encoded = _without_padding(encoded, self._tokenizer.pad_id)
        ids, labels, starts = expand_images(encoded, self._num_image_tokens, self.max_length)
        return RossSample(
            sample_id=index,
            input_ids=ids,
            labels=labels,
            images=tuple(self._span(index, record, i, start) for i, start in enumerate(starts)),
            mismatch=encoded.mismatch,
            num_images_cut=len(record.images) - len(starts),
            lacks_images=record.lacks_images,
        )

    def question(self, index: int) -> RossSample:
        """The first question of one sample, with its images and nothing supervised; see `encode_question`.

        Raises:
            SampleError: the record is malformed or holds no question.
        """
        record = self.record(index)
        ids = encode_question(record.turns, self._template, self._tokenizer, num_images=len(record.images))
        encoded = EncodedConversation(ids, [IGNORE_LABEL] * len(ids))
        tokens, labels, starts = expand_images(encoded, self._num_image_tokens, self.max_length)
        if not len(tokens):
            raise ConversationError(f"{record.where}: seq_length {self.max_length} has no room for its first image")
        spans = tuple(self._span(index, record, i, start) for i, start in enumerate(starts))
        return RossSample(index, tokens, labels, spans, num_images_cut=ids.count(IMAGE_TOKEN_ID) - len(starts))

    def record(self, index: int) -> Record:
        """The checked record of one sample. Raises RecordError, IndexError."""
        raw, where = self._raw(index)
        return parse_record(raw, where, needs_answer=self.supervise)

    def token_length(self, index: int) -> int:
        """Tokens of one sample, images expanded. Raises RecordError, ConversationError."""
        return self.measure(index).num_tokens

    def measure(self, index: int) -> Measurement:
        """What `self[index]` would hold, without making it. Raises RecordError, ConversationError."""
        return self.measure_record(self.record(index))

    def measure_record(self, record: Record) -> Measurement:
        """The same for one of the data set's records. Raises ConversationError."""
        encoded = self._encode(record)
        if self._reference:
            encoded = _without_padding(encoded, self._tokenizer.pad_id)
        num_tokens = num_images = num_supervised = 0
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
            width = self._num_image_tokens if token == IMAGE_TOKEN_ID else 1
            if num_tokens + width > self.max_length:
                break
            num_supervised += label != IGNORE_LABEL and num_tokens > 0
            num_images += token == IMAGE_TOKEN_ID
            num_tokens += width
        return Measurement(num_tokens, num_supervised, num_images, len(record.images) - num_images, encoded.mismatch)

    def room_needed(self, index: int) -> Room:
        """What one sample needs, however little `max_length` is. Raises RecordError, ConversationError."""
        encoded = self._encode(self.record(index), _ANY_LENGTH)
        num_tokens, image, answer = 0, None, None
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
            is_image = token == IMAGE_TOKEN_ID
            num_tokens += self._num_image_tokens if is_image else 1
            if is_image and image is None:
                image = num_tokens
            if label != IGNORE_LABEL and num_tokens > 1 and answer is None:
                answer = num_tokens
        return Room(image, answer)

    def modality_length(self, index: int) -> int:
        """Words of one record, negative without image, never 0: what the published grouped sampler sorts by.

        A malformed record counts as one word without image.
        """
        try:
            raw, _ = self._raw(index)
        except RecordError:
            return -1
        return (1 if has_image(raw) else -1) * max(word_count(raw), 1)

    @property
    def path(self) -> str:
        """Its first file."""
        return self._sources[0].path

    @property
    def fingerprint(self) -> str:
        """Names everything the token ids depend on: records, tokenizer, template and settings."""
        settings = [self._template, self._num_image_tokens, self.max_length, self._reference]
        settings += [] if self.supervise else ["unsupervised"]
        return " ".join([self.records_fingerprint, self._tokenizer.fingerprint, *map(str, settings)])

    @property
    def records_fingerprint(self) -> str:
        """Names the files of records and their state."""
        return " ".join(source.fingerprint for source in self._sources)

    def contents(self) -> list[tuple[str, int, str]]:
        """Path, number of records and content digest of every file. Raises OSError."""
        return [(source.path, len(source), source.content_digest()) for source in self._sources]

    @property
    def images_fingerprint(self) -> str:
        """Names where images come from and what becomes of them."""
        return f"{self._image_root} {self.image_processor}"

    def _raw(self, index: int) -> tuple[Any, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        source, local = self._locate(index)
        return source[local], f"{source.path}[{local}]"

    def _locate(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and its index there."""
        number = bisect.bisect_right(self._ends, index)
        source = self._sources[number]
        return source, index - (self._ends[number] - len(source))

    def _encode(self, record: Record, max_length: int | None = None) -> EncodedConversation:
        """`max_length`: instead of the data set's."""
        max_length = max_length or self.max_length
        if len(record.images) > MAX_IMAGES_PER_SAMPLE:
            raise RecordError(
                f"{record.where}: has {len(record.images)} images; a sample may have at most {MAX_IMAGES_PER_SAMPLE}, "
                "because the noise of more would repeat"
            )
        try:
            encoded = encode_conversation(
                record.turns,
                self._template,
                self._tokenizer,
                num_images=len(record.images),
                max_length=max_length,
                reference=self._reference,
                supervise=self.supervise,
            )
        except ConversationError as error:
            raise ConversationError(f"{record.where}: {error}") from error
        placeholders = encoded.input_ids.count(IMAGE_TOKEN_ID)
        if placeholders != len(record.images):
            raise ConversationError(
                f"{record.where}: {placeholders} <image> placeholders for {len(record.images)} images; they must agree"
            )
        if encoded.input_ids[:1] == [IMAGE_TOKEN_ID] and self._num_image_tokens > max_length:
            raise ConversationError(
                f"{record.where}: begins with an image, whose {self._num_image_tokens} tokens are more than seq_length "
                f"{max_length}: nothing would be left of it"
            )
        return encoded

    def _span(self, index: int, record: Record, number: int, start: int) -> ImageSpan:
        name = record.images[number]
        return ImageSpan(
            start,
            number,
            load_pixels=functools.partial(self._load_pixels, index, number, name, record.where),
            read_bytes=functools.partial(self.read_image, index, number, name),
            name=f"{record.where}: image {name!r}",
            stamp=functools.partial(self._image_stamp, index, number, name),
        )

    def _load_pixels(self, index: int, number: int, name: str, where: str) -> Tensor:
        """float32 [3, P, P]. Raises ImageError."""
        try:
            return self.image_processor(self.image_processor.decode(self.read_image(index, number, name), name))
        except ImageError as error:
            raise ImageError(f"{where}: {error}") from error

    def read_image(self, index: int, number: int, name: str) -> bytes:
        """The bytes of a sample's image `number`, called `name`. Raises ImageError."""
        source, local = self._locate(index)
        return source.read_image(local, number, name)

    def _image_stamp(self, index: int, number: int, name: str) -> str:
        source, local = self._locate(index)
        return source.image_stamp(local, number, name)


class ConcatDataset:
    """Several data sets one after the other, perhaps with different templates; sample ids count through all of them."""

    def __init__(self, datasets: Sequence[RossDataset]):
        """
        Raises:
            ValueError: no data set, or their images are processed differently.
        """
        if not datasets:
            raise ValueError("a blend needs at least one data set")
        if any(d.image_processor != datasets[0].image_processor for d in datasets):
            raise ValueError("all data sets of a blend must process images alike")
        self.datasets = list(datasets)
        self.image_processor = datasets[0].image_processor
        self.ends = list(itertools.accumulate(len(d) for d in datasets))
        """One past the last sample id of each data set."""

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> RossSample:
        dataset, local = self._locate(index)
        return dataclasses.replace(dataset[local], sample_id=index)

    def question(self, index: int) -> RossSample:
        """The first question of one sample. Raises SampleError."""
        dataset, local = self._locate(index)
        return dataclasses.replace(dataset.question(local), sample_id=index)

    def record(self, index: int) -> Record:
        """The checked record of one sample. Raises RecordError, IndexError."""
        dataset, local = self._locate(index)
        return dataset.record(local)

    def token_length(self, index: int) -> int:
        """Tokens of one sample. Raises RecordError, ConversationError."""
        dataset, local = self._locate(index)
        return dataset.token_length(local)

    def modality_length(self, index: int) -> int:
        """Words of one record with the sign of its modality."""
        dataset, local = self._locate(index)
        return dataset.modality_length(local)

    def contents(self) -> list[tuple[str, int, str]]:
        """Path, number of records and content digest of every file. Raises OSError."""
        return [content for dataset in self.datasets for content in dataset.contents()]

    @property
    def fingerprint(self) -> str:
        return " | ".join(d.fingerprint for d in self.datasets)

    @property
    def records_fingerprint(self) -> str:
        return " | ".join(d.records_fingerprint for d in self.datasets)

    def _locate(self, index: int) -> tuple[RossDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        number = bisect.bisect_right(self.ends, index)
        return self.datasets[number], index - (self.ends[number] - len(self.datasets[number]))


def expand_images(
    encoded: EncodedConversation, num_image_tokens: int, max_length: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Every IMAGE_TOKEN_ID becomes `num_image_tokens` of them; then the sequence is cut to `max_length`.

    A cut through an image moves to the image's front: what that removes has no supervised successor, so the language
    loss stays the same.

    Returns:
        int64 [s] ids, int64 [s] labels, and where each image that is left starts.
    """
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if token != IMAGE_TOKEN_ID:
            ids.append(token)
            labels.append(label)
            continue
        if len(ids) + num_image_tokens > max_length:
            break
        starts.append(len(ids))
        ids += [IMAGE_TOKEN_ID] * num_image_tokens
        labels += [IGNORE_LABEL] * num_image_tokens
    return torch.tensor(ids[:max_length]), torch.tensor(labels[:max_length]), starts


def _without_padding(encoded: EncodedConversation, pad_id: int) -> EncodedConversation:
    """The published model drops every token that equals the padding token, also inside a text."""
    kept = [(i, label) for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if i != pad_id]
    return EncodedConversation([i for i, _ in kept], [label for _, label in kept], encoded.mismatch)

"""The table of record formats: how people write down conversations and images, and what it says in one plain form.

A format is recognised by its fields, never by guess; what is not in the table is refused by name:

    list of turns    "conversations" or "messages"; also one object of lists, as `datasets` stores a Sequence
    a turn           {"from", "value"} or {"role", "content"}; content is a string or a list of typed parts
    speakers         human = user, gpt = assistant, system (a first turn, or the field "system")
    images           "image" or "images": a name, a data: URI, {"path"}, or a list of them; or parts of the content

Names are those of LLaVA, ShareGPT, LLaMA-Factory, ms-swift, OpenAI and the hub. No torch here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ross.config.shown import shown
from megatron_ross.data.errors import ImageError, RecordError

FORMATS_VERSION = 2
"""Part of what names cached lengths and indices: they are made anew when the same file is read in another way."""

IMAGE_TAG = "<image>"
TURN_LISTS = ("conversations", "messages")
IMAGE_FIELDS = ("image", "images")
DATA_SCHEME = "data:"
"""A name that begins so is no file: the record brings the image itself, in base64."""

_TURN_KEYS = (("from", "value"), ("role", "content"))
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_TOOL_ROLES = {"tool", "function", "observation", "function_call", "tool_call", "ipython"}
_IMAGE_PARTS = {"image": ("image", "url", "path"), "image_url": ("image_url",)}
_OTHER_MEDIA_TAG = re.compile("<(video|audio)>")
_OTHER_MEDIA = re.compile(
    r"(video|audio|sound|speech|point_?cloud)s?(_?(path|file|url|name|byte|list)s?)?(_?\d+)?|mp4|wav|mp3|flac",
    re.IGNORECASE,
)
_UNKNOWN_IMAGES = re.compile(
    r"(image|img|picture|photo|pixel)s?(_?(path|file|filename|url|name|byte|list|data|value|content|base64|b64)s?)?(_?\d+)?"
    r"|media|jpe?g|png|webp",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is "human" or "gpt", or "system" in the first turn."""

    role: str
    text: str


@dataclass(frozen=True)
class PlainRecord:
    """Turns with an IMAGE_TAG per image, and the images in the order of the tags: file names or data: URIs."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def plain_record(raw: dict[str, Any], where: str, *, needs_answer: bool = True) -> PlainRecord:
    """What a raw record says. Without `needs_answer`, a record of nothing but images gets a turn that shows them.

    A record in the published form ({"from", "value"} and "image") may repeat or leave out tags; whether they fit its
    images is found out when it is tokenised. In all other forms there are as many tags as images.

    Raises:
        RecordError: names the record and the offending field.
    """
    _refuse_other_media(raw, where)
    images = _field_images(raw, where)
    if images and not needs_answer and not any(_is_given(raw.get(key)) for key in TURN_LISTS):
        return PlainRecord((Turn("human", "\n".join([IMAGE_TAG] * len(images))),), images)
    key, raw_turns = _turn_list(raw, where)
    role_key, text_key = _turn_keys(key, raw_turns[0])
    turns: list[Turn] = []
    parts = _Parts()
    for i, turn in enumerate(raw_turns):
        turns.append(_turn(turn, role_key, text_key, parts, f"{where}: {key}[{i}]"))
    if parts.names and images:
        raise RecordError(f"{where}: images are named in '{key}' and in 'image' or 'images'; name them in one place")
    if parts.num_bare and parts.names:
        raise RecordError(f"{where}: some images in '{key}' have a name and some have none; name all or none")
    is_published = role_key == "from" and not raw.get("images") and not parts.names
    images = tuple(parts.names) or images
    num_tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if num_tags != len(images) and ((images and not is_published) or parts.num_bare):
        raise RecordError(f"{where}: {num_tags} <image> for {len(images)} images; they must agree")
    return PlainRecord(tuple(_with_system(turns, raw, where)), images)


def _turn_list(raw: dict[str, Any], where: str) -> tuple[str, list[Any]]:
    """The key and the turns of the one list that a record has."""
    given = [key for key in TURN_LISTS if _is_given(raw.get(key))]
    if len(given) > 1:
        raise RecordError(f"{where}: has 'conversations' and 'messages'; keep one of the two")
    key = given[0] if given else "conversations"
    turns = _as_list(raw.get(key))
    if not isinstance(turns, list) or not turns:
        raise RecordError(
            f"{where}: field '{key}'{'' if given else ' (or messages)'} must be a non-empty list of turns; "
            f"the record has {shown(sorted(k for k in raw if isinstance(k, str)))}"
        )
    return key, turns


def _as_list(turns: Any) -> Any:
    """{"from": [a, b], "value": [c, d]} -> [{"from": a, "value": c}, {"from": b, "value": d}]; else unchanged."""
    if not isinstance(turns, dict) or not all(isinstance(column, list) for column in turns.values()):
        return turns
    if len({len(column) for column in turns.values()}) != 1:
        return turns
    return [dict(zip(turns, row, strict=True)) for row in zip(*turns.values(), strict=True)]


def _turn_keys(list_key: str, turn: Any) -> tuple[str, str]:
    """The keys of a speaker and of what is said, by those that the first turn has."""
    for keys in _TURN_KEYS:
        if isinstance(turn, dict) and any(turn.get(key) is not None for key in keys):
            return keys
    return _TURN_KEYS[TURN_LISTS.index(list_key)]


@dataclass
class _Parts:
    """Images among the parts of the content: the names of those that have one, the number of those that have none."""

    names: list[str] = field(default_factory=list)
    num_bare: int = 0


def _turn(turn: Any, role_key: str, text_key: str, parts: _Parts, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} must be an object, found {type(turn).__name__}")
    name = turn.get(role_key)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        is_tool = isinstance(name, str) and name in _TOOL_ROLES
        rule = f"must be {', '.join(_ROLES)}" + (" (calls of tools are not supported)" if is_tool else "")
        raise RecordError(f"{where}: field '{role_key}' {rule}, found {shown(name)}")
    if role_key == "role":
        _check_message(turn, where)
    text = turn.get(text_key)
    if isinstance(text, list) and role_key == "role":
        text = "".join(_part_texts(text, parts, f"{where}: content"))
    if not isinstance(text, str):
        raise RecordError(f"{where}: field '{text_key}' must be a string, found {type(text).__name__}")
    if not is_unicode(text):
        raise RecordError(f"{where}: field '{text_key}' holds a lone surrogate (\\ud800 to \\udfff), which is no text")
    if role == "human" and (tag := _OTHER_MEDIA_TAG.search(text)):
        raise RecordError(f"{where}: says {tag.group()}, but only images are supported")
    return Turn(role, text)


def _check_message(turn: dict[str, Any], where: str) -> None:
    """Refuse what would change the meaning of a message and cannot be done. Raises RecordError."""
    for key in ("tool_calls", "function_call", "tool_call_id"):
        if _is_given(turn.get(key)):
            raise RecordError(f"{where}: field '{key}': calls of tools are not supported")
    for key in ("weight", "loss"):
        if turn.get(key, 1) not in (None, True, 1):
            raise RecordError(f"{where}: field '{key}' is {shown(turn[key])}, but every answer is trained on")


def _part_texts(content: list[Any], parts: _Parts, where: str) -> Iterator[str]:
    """What the typed parts of a message say, an IMAGE_TAG for an image; its name goes to `parts`."""
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif isinstance(kind, str) and kind in _IMAGE_PARTS:
            name = _part_image(part, kind, f"{where}[{i}]")
            if name is None:
                if part.get("index") not in (None, parts.num_bare):
                    raise RecordError(f"{where}[{i}]: index {shown(part['index'])}: images must come in their order")
                parts.num_bare += 1
            else:
                parts.names.append(name)
            yield IMAGE_TAG
        else:
            what = f"type {shown(kind)}" if isinstance(part, dict) else type(part).__name__
            raise RecordError(f"{where}[{i}]: a part must have type text, image or image_url, found {what}")


def _part_image(part: dict[str, Any], kind: str, where: str) -> str | None:
    """The name in an image part; None: it takes the next of the record's images."""
    for key in _IMAGE_PARTS[kind]:
        value = part.get(key)
        if isinstance(value, dict):
            if _is_given(value.get("bytes")):
                raise RecordError(f"{where}: holds the bytes of an image; they belong into the field 'images'")
            value = value.get("url") or value.get("path")
        if _is_given(value):
            return _name(value, where, key)
    if kind == "image_url":
        raise RecordError(f"{where}: field 'image_url' must hold a url")
    return None


def _with_system(turns: list[Turn], raw: dict[str, Any], where: str) -> list[Turn]:
    """The turns with at most one system text, in front; an empty one is none."""
    said = [i for i, turn in enumerate(turns) if turn.role == "system"]
    text = raw.get("system")
    if _is_given(text):
        if said or not isinstance(text, str) or not is_unicode(text):
            reason = "a turn has a system text, too" if said else f"must be a text, found {shown(text)}"
            raise RecordError(f"{where}: field 'system': {reason}")
        turns = [Turn("system", text), *turns]
    elif said not in ([], [0]):
        raise RecordError(f"{where}: turn {said[-1]} is from 'system': only the first turn can be")
    if turns[0].role != "system":
        return turns
    if IMAGE_TAG in turns[0].text:
        raise RecordError(f"{where}: the system text says <image>, but images belong to questions")
    return turns if turns[0].text.strip() else turns[1:]


def _field_images(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """Names or data: URIs of the fields "image" and "images"."""
    given = [images for key in IMAGE_FIELDS if (images := _named_images(raw.get(key), key, where))]
    if len(given) == 2 and given[0] != given[1]:
        raise RecordError(f"{where}: fields 'image' and 'images' name different images; keep one of the two")
    return given[0] if given else ()


def _named_images(value: Any, key: str, where: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [] if value in (None, "") or _is_empty_object(value) else [value]
    return tuple(_name(item.get("path") if _is_reference(item) else item, where, key) for item in items)


def _is_reference(item: Any) -> bool:
    """{"path": name}, with "bytes" absent or null; a JSON file has no way to say bytes."""
    return isinstance(item, dict) and set(item) <= {"path", "bytes"} and item.get("bytes") is None


def _is_empty_object(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(item is None for item in value.values())


def _name(value: Any, where: str, key: str) -> str:
    if not isinstance(value, str) or not value or not is_unicode(value):
        raise RecordError(f"{where}: field '{key}' must be a file name or a list of them, found {shown(value)}")
    return value


def _refuse_other_media(raw: dict[str, Any], where: str) -> None:
    """Fields that say a record is about something that would be lost. Raises RecordError."""
    has_images = any(_is_given(raw.get(key)) for key in IMAGE_FIELDS)
    for key, value in raw.items():
        if not isinstance(key, str) or not _is_given(value):
            continue
        if _OTHER_MEDIA.fullmatch(key):
            raise RecordError(f"{where}: field {shown(key)}: only images are supported")
        if key not in IMAGE_FIELDS and not has_images and _UNKNOWN_IMAGES.fullmatch(key):
            raise RecordError(f"{where}: field {shown(key)} is not read; name images in 'image' or 'images'")
        if key == "tools":
            raise RecordError(f"{where}: field 'tools': calls of tools are not supported")


def is_media_field(key: str) -> bool:
    """Whether a record that has this field is about images, videos or sounds."""
    return bool(key in IMAGE_FIELDS or _OTHER_MEDIA.fullmatch(key) or _UNKNOWN_IMAGES.fullmatch(key))


def _is_given(value: Any) -> bool:
    """Whether a field says something: tables fill empty cells with null, NaN, 0, "", [] or {"path": null}."""
    is_nan = isinstance(value, float) and value != value
    return bool(value) and not is_nan and not _is_empty_object(value)


def is_unicode(text: str) -> bool:
    """JSON may escape half a surrogate pair; Python reads it, but no encoder or tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short_name(name: str) -> str:
    """An image's name for messages: of a data: URI what stands in front of the data."""
    return name.partition(",")[0][:80] if name.startswith(DATA_SCHEME) else name


def embedded_image(raw: Any, number: int, max_bytes: int) -> bytes:
    """The bytes of a raw record's image `number`, which is a data: URI.

    Raises:
        ImageError: it is no base64, or has more than `max_bytes`.
    """
    try:
        head, _, text = plain_record(raw, "record", needs_answer=False).images[number].partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"{shown(head)} does not end in ;base64")
        if len(text) > max_bytes * 4 // 3 + 4:
            raise ValueError(f"it has {len(text):,} characters, more than an image of {max_bytes:,} bytes")
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ImageError(f"image {number}, a data: URI, cannot be read: {error}") from error


def has_image(raw: Any) -> bool:
    """Whether a raw record brings images; False for a malformed one."""
    if not isinstance(raw, dict):
        return False
    parts = (part for text in _texts(raw) if isinstance(text, list) for part in text if isinstance(part, dict))
    return any(_is_given(raw.get(key)) for key in IMAGE_FIELDS) or any(map(_is_image_part, parts))


def word_count(raw: Any) -> int:
    """Words of a raw record as the published length-grouped sampler counts them; 0 for a malformed one."""
    count = 0
    for text in _texts(raw):
        if isinstance(text, list):
            said = (IMAGE_TAG if _is_image_part(part) else part.get("text") for part in text if isinstance(part, dict))
            text = "".join(piece for piece in said if isinstance(piece, str))
        count += len(text.split()) if isinstance(text, str) else 0
    return count


def _is_image_part(part: dict[str, Any]) -> bool:
    return isinstance(part.get("type"), str) and part["type"] in _IMAGE_PARTS


def _texts(raw: Any) -> Iterator[Any]:
    """What every turn says, unchecked."""
    if not isinstance(raw, dict):
        return
    for key in TURN_LISTS:
        turns = _as_list(raw.get(key))
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            continue
        for turn in turns:
            if isinstance(turn, dict):
                yield turn["value"] if "value" in turn else turn.get("content")

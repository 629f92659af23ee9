"""The table of record formats: every form of one conversation says the same; what is not in the table is refused."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest
import torch

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import ConversationError, ImageError, RecordError
from megatron_ross.data.formats import has_image, word_count
from megatron_ross.data.index import RecordFile
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.quarantine import BadSamplePolicy, TooManyBadSamplesError
from megatron_ross.data.records import parse_record
from tests.unit.data.conftest import chat

QUESTION, ANSWER, SECOND, LAST = "<image>\nWhich of <image> is red?", "The first.", "Sure?", "Yes."
NAMES = ["1.png", "2.png"]


def _said(*texts: str, role: str = "from", text: str = "value", names: tuple[str, str] = ("human", "gpt")) -> list:
    return [{role: names[i % 2], text: said} for i, said in enumerate(texts)]


TEXTS = (QUESTION, ANSWER, SECOND, LAST)
OPENAI = {"role": "role", "text": "content", "names": ("user", "assistant")}
TYPED: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "1.png", "detail": "high"}},
    {"type": "text", "text": "\nWhich of "},
    {"type": "image", "image": "2.png"},
    {"type": "text", "text": " is red?"},
]
BARE: list[dict[str, Any]] = [
    {"type": "image", "index": 0, "text": None},
    {"type": "text", "text": "\nWhich of ", "index": None},
    {"type": "image", "index": 1},
    {"type": "text", "text": " is red?"},
]


def _typed(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts}, *_said(*TEXTS, **OPENAI)[1:]]


FORMS: dict[str, dict[str, Any]] = {
    "LLaVA": {"id": 7, "image": NAMES, "conversations": _said(*TEXTS)},
    "ShareGPT, images": {"images": NAMES, "conversations": _said(*TEXTS)},
    "ShareGPT, other names": {"images": NAMES, "conversations": _said(*TEXTS, names=("user", "assistant"))},
    "both fields alike": {"image": NAMES, "images": NAMES, "conversations": _said(*TEXTS)},
    "MiniCPM": {"image": NAMES, "conversations": _said(*TEXTS, **OPENAI)},
    "messages": {"messages": _said(*TEXTS, **OPENAI), "images": NAMES, "videos": [], "audios": None},
    "messages, from and value": {"messages": _said(*TEXTS), "images": NAMES},
    "both lists, one empty": {"conversations": [], "messages": _said(*TEXTS, **OPENAI), "images": NAMES},
    "paths": {"messages": _said(*TEXTS, **OPENAI), "images": [{"path": n, "bytes": None} for n in NAMES]},
    "typed": {"messages": _typed(TYPED), "id": None},
    "typed, images apart": {"messages": _typed(BARE), "images": NAMES},
    "one object of lists": {
        "conversations": {"from": ["human", "gpt"] * 2, "value": list(TEXTS)},
        "images": NAMES,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_say_the_same(form: str, toy, qwen, processor):
    (toy / "data.json").write_text(json.dumps([FORMS["LLaVA"], FORMS[form]]))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    expected, found = dataset.record(0), dataset.record(1)
    assert found.turns == expected.turns
    assert found.images == expected.images == tuple(NAMES)
    assert torch.equal(dataset[1].input_ids, dataset[0].input_ids)
    assert torch.equal(dataset[1].labels, dataset[0].labels)
    for span, other in zip(dataset[1].images, dataset[0].images, strict=True):
        assert torch.equal(span.load_pixels(), other.load_pixels())
    assert dataset.modality_length(1) == dataset.modality_length(0) > 0


def test_images_may_be_in_the_record_itself(toy, qwen, processor):
    uris = [
        "data:image/png;base64," + base64.b64encode((toy / "images" / name).read_bytes()).decode() for name in NAMES
    ]
    parts = copy.deepcopy(TYPED)
    parts[0]["image_url"], parts[2]["image"] = {"url": uris[0]}, uris[1]
    records = [FORMS["LLaVA"], {"messages": _typed(parts)}, {"images": uris, "conversations": _said(*TEXTS)}]
    (toy / "data.json").write_text(json.dumps(records))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    for index in (1, 2):
        assert all(len(name) < 40 for name in dataset.record(index).images), "no message repeats a megabyte"
        for span, other in zip(dataset[index].images, dataset[0].images, strict=True):
            assert torch.equal(span.load_pixels(), other.load_pixels())


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png,abc", "does not end in ;base64"),
        ("data:image/png;base64,a?b=", "cannot be read"),
        ("data:image/png;base64,", "empty"),
    ],
)
def test_damaged_data_uris_are_bad_images(uri, message, toy, qwen, processor):
    (toy / "data.json").write_text(json.dumps([{"image": uri, "conversations": chat("<image>\na", "b")}]))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    with pytest.raises(ImageError, match=message):
        dataset[0].images[0].load_pixels()


def _record(**fields: Any) -> dict[str, Any]:
    return {"conversations": chat("<image>\na", "b"), "images": ["x.png"]} | fields


def _messages(said: Any, **fields: Any) -> dict[str, Any]:
    """A question, and an answer with these fields."""
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "b"} | fields]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_record(messages=chat("a", "b")), "has 'conversations' and 'messages'"),
        (_record(image="y.png"), "name different images"),
        (_record(images=["x.png", "y.png"]), "1 <image> for 2 images"),
        (_record(conversations=chat("<image><image>\na", "b")), "2 <image> for 1 images"),
        (_record(conversations=chat("a", "b")), "0 <image> for 1 images"),
        (_record(images=[{"bytes": "iVBOR"}]), "field 'images' must be a file name"),
        (_record(images=["x.png", None]), "field 'images' must be a file name"),
        (_record(video="v.mp4"), "field 'video': only images are supported"),
        (_record(audio_path="a.wav"), "field 'audio_path'"),
        ({"videos": ["v.mp4"], "conversations": chat("a", "b")}, "field 'videos'"),
        ({"image_path": "v.png", "conversations": chat("a", "b")}, "field 'image_path' is not read; name images in"),
        ({"img": "v.png", "conversations": chat("a", "b")}, "field 'img' is not read"),
        ({"image_1": "v.png", "image_2": "w.png", "conversations": chat("a", "b")}, "field 'image_1' is not read"),
        ({"images3": ["v.png"], "messages": []}, "field 'images3' is not read"),
        ({"jpg": "v", "conversations": chat("a", "b")}, "field 'jpg' is not read"),
        ({"media": ["v.png"], "conversations": chat("a", "b")}, "field 'media' is not read"),
        ({"image_base64": "v", "conversations": chat("a", "b")}, "field 'image_base64' is not read"),
        (_record(video_1="v.mp4"), "field 'video_1': only images are supported"),
        (_record(mp4="v"), "field 'mp4': only images are supported"),
        ({"conversations": chat("<video>\na", "b")}, r"conversations\[0\]: says <video>"),
        ({"conversations": chat("a", "b") + chat("hear <audio>", "b")}, r"conversations\[2\]: says <audio>"),
        ({"instruction": "a", "output": "b"}, r"field 'conversations' \(or messages\).*'instruction', 'output'"),
        ({"messages": "[]"}, "field 'messages' must be a non-empty list"),
        (_messages("a", tool_calls=[{"id": "c"}]), r"messages\[1\]: field 'tool_calls'"),
        (_messages("a", weight=0), "field 'weight' is 0, but every answer is trained on"),
        (_messages("a", loss=False), "field 'loss' is False"),
        (_messages("a") | {"tools": "[{}]"}, "field 'tools'"),
        (
            _messages("a", role="tool"),
            r"messages\[1\]: field 'role' .*\(calls of tools are not supported\), found 'tool'",
        ),
        (_messages("a", role="observation"), "calls of tools"),
        (_messages("a", role="critic"), "must be human, user, gpt, assistant, system, found 'critic'"),
        (_messages("a", content=None), r"messages\[1\]: field 'content' must be a string, found NoneType"),
        (_messages([{"type": "video_url", "video_url": {"url": "v.mp4"}}]), r"content\[0\].*found type 'video_url'"),
        (_messages([{"type": "input_audio"}]), "found type 'input_audio'"),
        (_messages(["a"]), "found str"),
        (_messages([{"type": "image_url", "image_url": {}}]), "must hold a url"),
        (_messages([{"type": "image"}]), "1 <image> for 0 images"),
        (_messages([{"type": "image", "image": {"bytes": "x", "path": "a"}}]), "bytes of an image; they belong into"),
        (_messages([{"type": "image"}, {"type": "image", "path": "a"}]), "name all or none"),
        (_messages([{"type": "image", "path": "a"}]) | {"images": ["a"]}, "in one place"),
        (_messages([{"type": "image", "index": 1}]) | {"images": ["a"]}, "must come in their order"),
        (_messages([{"type": "image"}, {"type": "text", "text": "<image>"}]) | {"images": ["a"]}, "2 <image> for 1"),
        ({"conversations": [{"from": "system", "value": "<image>"}, *chat("a", "b")]}, "system text says <image>"),
        ({"conversations": [*chat("a", "b"), {"from": "system", "value": "s"}]}, "only the first turn"),
        (
            {"conversations": [{"from": "system", "value": "s"}, *chat("a", "b")], "system": "t"},
            "has a system text, too",
        ),
        ({"conversations": chat("a", "b"), "system": 3}, "field 'system': must be a text"),
    ],
)
def test_what_the_table_does_not_hold_is_refused_by_name(raw, message):
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(raw, "data.json[5]")
    assert str(caught.value).startswith("data.json[5]")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"video": None},
        {"videos": []},
        {"audio": ""},
        {"image_path": "x.png"},
        {"image_url": "https://host/b.png"},
        {"depth": 3},
    ],
)
def test_empty_media_fields_and_other_names_of_the_same_image_are_no_media(fields):
    assert parse_record(_record(**fields), "f").images == ("x.png",)


def test_html_in_answers_and_images_with_numbers_are_no_media():
    turns = chat("Write a page.", "<video src='a'></video> and <video>")
    assert parse_record({"conversations": turns, "image_id": 3, "image_size": [1, 2]}, "f").images == ()


def test_a_published_record_may_still_repeat_its_tag(toy, qwen, processor):
    """Published code merges the tags of a turn; the same text with "images" has one tag too many."""
    turns = chat("<image>\nSame as <image>?", "b")
    records = [{"image": "1.png", "conversations": turns}, {"images": ["1.png"], "conversations": turns}]
    (toy / "data.json").write_text(json.dumps(records))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    assert len(dataset[0].images) == 1
    with pytest.raises(RecordError, match="2 <image> for 1 images"):
        dataset[1]


def test_images_on_the_web_are_refused_by_name(toy, qwen, processor):
    parts = [{"type": "image_url", "image_url": {"url": "https://host/a.png"}}, {"type": "text", "text": "a"}]
    (toy / "data.json").write_text(json.dumps([_messages(parts)]))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    with pytest.raises(ImageError, match=r"https://host/a.png' is not downloaded; put a copy below"):
        dataset[0].images[0].load_pixels()


def test_records_of_images_alone_are_taken_where_no_answer_is_needed():
    raw = {"images": ["a.png", "b.png"]}
    with pytest.raises(RecordError, match="non-empty list of turns"):
        parse_record(raw, "f")
    record = parse_record(raw, "f", needs_answer=False)
    assert (record.images, [t.text for t in record.turns]) == (("a.png", "b.png"), ["<image>\n<image>"])


def test_words_and_kinds_as_the_grouped_order_counts_them():
    assert [word_count(raw) for raw in FORMS.values()] == [10] * len(FORMS)
    assert all(has_image(raw) for raw in FORMS.values())
    for raw in (None, [], {"messages": 3}, {"messages": [{"content": [3, {"type": []}]}]}, {"images": {"path": None}}):
        assert (word_count(raw), has_image(raw)) == (0, False)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(name, tmp_path):
    records = [{"id": i, "conversations": chat("é", "b")} for i in range(3)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = f"[{', '.join(lines)}]" if name == "a.json" else "\n".join(lines)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(RecordFile(tmp_path / name)) == records


def _loader(dataset, share: float) -> RossLoader:
    policy = BadSamplePolicy(max_bad_share=share, max_mismatch_share=1, min_samples=1)
    order = SampleOrder(len(dataset), shuffle=False)
    return RossLoader(dataset, order, global_batch_size=4, micro_batch_size=1, bad_samples=policy)


def test_records_that_speak_of_images_and_bring_none_are_counted_and_limited(toy, qwen, processor):
    """They are trained as text, as published, but no longer without a word."""
    turns = chat("<image>\nWhat is it?", "a house")
    records = [{"conversations": turns if i == 2 else chat("What is it?", "a house")} for i in range(4)]
    (toy / "data.json").write_text(json.dumps(records))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    loader = _loader(dataset, 0.25)
    batches = loader.next_step()
    assert loader.bad_sample_counts == {"lacks_images": 1}
    assert all(batch.num_supervised_tokens == batches[0].num_supervised_tokens > 0 for batch in batches)
    loader.close()
    loader = _loader(dataset, 0.24)
    with pytest.raises(TooManyBadSamplesError, match=r"1 of 4 samples .*lacks_images.*says <image>"):
        loader.next_step()
    loader.close()


def test_templates_that_need_an_image_skip_such_records(toy, qwen, processor):
    (toy / "data.json").write_text(json.dumps([{"conversations": chat("<image>", "a house")}]))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "plain", processor, 16, 512)
    with pytest.raises(ConversationError, match="1 <image> placeholders for 0 images"):
        dataset[0]

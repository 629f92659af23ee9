"""Processor and chat templates against the golden preprocessing and the training tokenisation."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from megatron_ross.data.conversation import encode_conversation
from megatron_ross.data.records import Turn
from megatron_ross.huggingface import RossProcessor
from megatron_ross.huggingface.chat_templates import chat_template
from megatron_ross.huggingface.processing_ross import expand_image_tokens
from tests.helpers import golden

IMAGES = golden.GOLDEN / "preprocess" / "images"
TEMPLATES = {"qwen2_siglip": "qwen_2", "llama_clip": "v1"}


@functools.cache
def processor(model: str) -> RossProcessor:
    return RossProcessor.from_pretrained(golden.checkpoint_dir(model))


@pytest.mark.parametrize("model", golden.MODELS)
def test_pixels_equal_golden(model: str) -> None:
    expected = load_file(golden.GOLDEN / "preprocess" / "images_uint8.safetensors")
    tower = model.split("_")[1]
    vision = golden.model_config(model).vision
    mean, std = (torch.tensor(v)[:, None, None] for v in (vision.image_mean, vision.image_std))
    limits = golden.metadata()["tolerances"]
    same_pillow = int(PIL.__version__.split(".")[0]) == 12
    limit = limits["image_uint8_pillow_12"] if same_pillow else limits["image_uint8_other_pillow"]
    checked = 0
    for key, value in expected.items():
        file, name, size, mode = key.split("|")
        if (name, size, mode) != (tower, "56", "pad"):
            continue
        pixels = processor(model)(images=Image.open(IMAGES / file))["pixel_values"][0]
        grey = (pixels * std + mean) * 255
        value = value if value.shape[0] == 3 else value.permute(2, 0, 1)
        difference = (grey - value).abs()
        assert difference.max() <= limit["max_abs"] + 1e-3, key
        assert difference.mean() <= limit.get("mean_abs", 0) + 1e-3, key
        checked += 1
    assert checked == len(list(IMAGES.iterdir()))


def conversation_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """LLaVA record -> chat messages with structured content."""
    messages = []
    for turn in record["conversations"]:
        content: list[dict[str, Any]] = []
        text = turn["value"]
        if "image" in record and "<image>" in text:
            content.append({"type": "image"})
            text = text.replace("<image>", "").strip()
        content.append({"type": "text", "text": text})
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    return messages


def conversations() -> list[dict[str, Any]]:
    """Golden records that chat messages can express: roles alternate, non-empty, no literal placeholder."""
    records = json.loads((golden.GOLDEN / "preprocess" / "conversations.json").read_text())
    usable = []
    for record in records:
        turns = record["conversations"]
        roles = [turn["from"] for turn in turns]
        if roles != ["human", "gpt"] * (len(turns) // 2) or not all(turn["value"].strip() for turn in turns):
            continue
        if "image" not in record and any("<image>" in turn["value"] for turn in turns):
            continue
        usable.append(record)
    assert len(usable) > 8
    return usable


@pytest.mark.parametrize("model", golden.MODELS)
def test_chat_template_gives_the_training_token_ids(model: str) -> None:
    prepare = processor(model)
    for record in conversations():
        turns = [Turn(t["from"], t["value"]) for t in record["conversations"]]
        num_images = int("image" in record)
        if num_images and not any("<image>" in t.text for t in turns):
            continue
        expected = encode_conversation(
            turns, TEMPLATES[model], prepare.text_tokenizer, num_images=num_images, max_length=10_000
        ).input_ids
        rendered = prepare.apply_chat_template(conversation_messages(record))
        count = rendered.count("<image>")
        inputs = prepare(text=rendered, images=[Image.new("RGB", (8, 8))] * count)
        assert inputs["input_ids"][0].tolist() == expand_image_tokens(expected, 16), record["id"]


@pytest.mark.parametrize("model", golden.MODELS)
def test_llama3_and_plain_templates_give_the_training_token_ids(model: str) -> None:
    tokenizer = processor(model).text_tokenizer
    record = {
        "image": "x",
        "conversations": [
            {"from": "human", "value": "Describe it.\n<image>"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    turns = [Turn(t["from"], t["value"]) for t in record["conversations"]]
    for name in ("llama3", "plain"):
        prepare = RossProcessor.from_pretrained(golden.checkpoint_dir(model), template=name)
        rendered = prepare.apply_chat_template(conversation_messages(record))
        expected = encode_conversation(turns, name, tokenizer, num_images=1, max_length=10_000).input_ids
        assert prepare.text_tokenizer.encode_with_images(rendered) == expected


@pytest.mark.parametrize("model", golden.MODELS)
def test_golden_prompts_come_out_of_the_chat_template(model: str) -> None:
    records = json.loads((golden.GOLDEN / "goldens" / model / "greedy_generation.json").read_text())
    for record in records:
        question = record["prompt"].split("<image>\n")[1].split(" ASSISTANT:")[0]
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        assert processor(model).apply_chat_template(messages, add_generation_prompt=True) == record["prompt"]


def test_apply_chat_template_tokenizes_images_and_history() -> None:
    prepare = processor("qwen2_siglip")
    picture = Image.open(IMAGES / "square.png")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "What colour?"}]},
    ]
    text = prepare.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.<|im_end|>USER: What colour? ASSISTANT:"
    inputs = prepare.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert torch.equal(inputs["input_ids"], prepare(text=text, images=picture)["input_ids"])


def test_text_with_placeholders_keeps_their_number() -> None:
    prepare = processor("qwen2_siglip")
    text = prepare.apply_chat_template([{"role": "user", "content": "Compare <image> with <image> now"}])
    assert text.endswith("USER: <image>\n<image>\nCompare  with  now ")


@pytest.mark.parametrize("model", golden.MODELS)
def test_padding_sides(model: str) -> None:
    prepare = processor(model)
    texts = ["USER: hi ASSISTANT:", "USER: <image>\nWhat is on the table? ASSISTANT:"]
    picture = Image.open(IMAGES / "square.png")
    left, right = (prepare(text=texts, images=[[], [picture]], padding_side=side) for side in ("left", "right"))
    short = prepare(text=texts[0])["input_ids"][0].tolist()
    assert left["input_ids"][0, -len(short) :].tolist() == short
    assert left["attention_mask"][0].tolist() == [0] * (left["input_ids"].shape[1] - len(short)) + [1] * len(short)
    assert right["input_ids"][0, : len(short)].tolist() == short
    assert right["attention_mask"].sum().item() == left["attention_mask"].sum().item()
    with pytest.raises(ValueError, match="padding_side 'up'"):
        prepare(text=texts[0], padding_side="up")


@pytest.mark.parametrize("model", golden.MODELS)
def test_auto_processor_and_save(model: str, tmp_path: Path) -> None:
    found = AutoProcessor.from_pretrained(golden.checkpoint_dir(model))
    assert isinstance(found, RossProcessor)
    found.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, RossProcessor)
    picture = Image.open(IMAGES / "portrait.jpg")
    text = found.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True)
    assert text == again.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True
    )
    first, second = found(text=text, images=picture), again(text=text, images=picture)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_absurd_processor_config_is_refused(tmp_path: Path) -> None:
    processor("llama_clip").save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    stored = json.loads(path.read_text())
    stored["vision"]["hf_config"]["image_size"] = 10**9
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"processor_config\.json.*image_size is 1000000000"):
        RossProcessor.from_pretrained(tmp_path)


def test_decoding_leaves_image_tokens_out() -> None:
    prepare = processor("qwen2_siglip")
    inputs = prepare(text="USER: <image>\nhello ASSISTANT:", images=Image.open(IMAGES / "tiny.png"))
    assert prepare.batch_decode(inputs["input_ids"]) == ["USER: \nhello ASSISTANT:"]


def test_wrong_numbers_and_kinds_of_images_are_refused() -> None:
    prepare = processor("qwen2_siglip")
    with pytest.raises(ValueError, match="the text has 2 <image> placeholders for 1 images"):
        prepare(text="<image> <image>", images=Image.new("RGB", (4, 4)))
    with pytest.raises(ValueError, match="the text has 0 <image> placeholders for 1 images"):
        prepare(text="hello", images=Image.new("RGB", (4, 4)))
    with pytest.raises(ValueError, match="images must be PIL images, paths, URLs or lists of them, not int"):
        prepare(text="<image>", images=3)
    with pytest.raises(ValueError, match=r"image 'no-cat\.png' cannot be read: .*No such file"):
        prepare(text="<image>", images="no-cat.png")
    with pytest.raises(ValueError, match="image 'data:image/png;base64,%%%' cannot be read"):
        prepare(text="<image>", images="data:image/png;base64,%%%")
    with pytest.raises(ValueError, match="give text, images or both"):
        prepare()


def test_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match="chat template 'chatml' is unknown"):
        chat_template("chatml")


@pytest.mark.parametrize("name", ["qwen_2", "v1", "llama3", "plain"])
def test_generation_marks_cover_the_answers(name: str) -> None:
    """What `{% generation %}` marks is each answer with its end token, nothing else."""
    tokenizer = processor("qwen2_siglip").tokenizer
    messages = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    out = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(name), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = tokenizer.decode(
        [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m], skip_special_tokens=False
    )
    expected = {
        "qwen_2": " A cat.<|im_end|> Yes<|im_end|>",
        "v1": " A cat.</s> Yes</s>",
        "llama3": "A cat.<|eot_id|>Yes<|eot_id|>",
        "plain": "A cat.\nYes\n",
    }
    assert marked == expected[name]

"""Prompts, presets and batches of ChatModel, on the golden checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.presets import Framework, Preset, preset
from megatron_ross.evaluation.prompts import Turn, turn_text, user_turn
from megatron_ross.huggingface.chat_templates import chat_template
from tests.helpers import golden
from tests.helpers.variants import make_variant

WIDE = Image.new("RGB", (60, 20), (200, 30, 30))
SYSTEM = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions. "
)


@functools.cache
def loaded(model: str, name: str = "default", framework: Framework = "builtin", dtype: str = "fp32") -> ChatModel:
    return ChatModel.load(str(golden.checkpoint_dir(model)), preset(name, framework), device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("markers", "text"),
    [
        ("training", "<image>\n<image>\nLook: What?"),
        ("joined", "<image> <image>\nLook: What? "),
        ("in_order", "<image>\nLook: <image>\nWhat? "),
    ],
)
def test_image_markers(markers: str, text: str) -> None:
    assert turn_text(Turn("user", (WIDE, "Look: ", WIDE, "What? ")), markers) == text


def test_markers_of_the_data() -> None:
    turn = user_turn("Is <image> red? ", [WIDE])
    assert turn_text(turn, "training") == "<image>\nIs  red?"
    assert turn_text(turn, "joined") == "Is <image> red? "
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        turn_text(turn, "in_order")
    assert turn_text(user_turn(" What is <image>? "), "joined") == " What is ? "


PUBLISHED_PROMPTS = {
    ("qwen2_siglip", "vlmevalkit"): ("human", "<|im_end|>"),
    ("llama_clip", "vlmevalkit"): ("human", "</s>"),
    ("llama_clip", "lmms-eval"): ("user", "</s>"),
    ("llama_clip", "builtin"): ("user", "</s>"),
}


@pytest.mark.parametrize(("model", "framework"), PUBLISHED_PROMPTS)
def test_published_prompts(model: str, framework: Framework) -> None:
    """Wording, separators and placeholders of the released evaluation code."""
    who, end = PUBLISHED_PROMPTS[model, framework]
    chat = loaded(model, "published", framework)
    conversation = [user_turn("What?", [WIDE]), Turn("assistant", ("Red.",)), user_turn("Sure?")]
    assert chat.prompt(conversation) == (
        f"{SYSTEM.format(who, who)}USER: <image>\nWhat? ASSISTANT: Red.{end}USER: Sure? ASSISTANT:"
    )
    assert chat.turn_end() == end


@pytest.mark.parametrize(
    ("name", "framework", "question"),
    [
        ("default", "builtin", "<image>\n<image>\nLook: Same?"),
        ("default", "lmms-eval", "<image>\n<image>\nLook: Same?"),
        ("default", "vlmevalkit", "<image>\n<image>\nLook: Same?"),
        ("published", "builtin", "<image> <image>\nLook: Same?"),
        ("published", "lmms-eval", "<image> <image>\nLook: Same?"),
        ("published", "vlmevalkit", "<image>\nLook: <image>\nSame?"),
    ],
)
def test_prompts_with_two_pictures(name: str, framework: Framework, question: str) -> None:
    """Every preset's placeholders reach the prompt, and a model can be asked so."""
    chat = loaded("qwen2_siglip", name, framework)
    asked = [Turn("user", (WIDE, "Look: ", WIDE, "Same?"))]
    assert chat.prompt(asked) == f"{SYSTEM.format('human', 'human')}USER: {question} ASSISTANT:"
    assert len(chat.answer([asked], Decoding(2))) == 1


def test_default_asks_vicuna_as_it_was_trained() -> None:
    assert (
        loaded("llama_clip", "default", "vlmevalkit").prompt([user_turn("?")]).startswith(SYSTEM.format("user", "user"))
    )


def test_fp16_and_padding_of_the_published_preset(tmp_path: Path) -> None:
    def square(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
        config["image_aspect_ratio"] = "square"

    stored = make_variant(tmp_path, "qwen2_siglip", square)
    export_checkpoint(stored.path, tmp_path / "llava", "llava", templates=chat_template)
    for folder in (stored.composite, tmp_path / "llava"):
        pixels = []
        for name in ("default", "published"):
            chat = ChatModel.load(str(folder), preset(name, "vlmevalkit"), device="cpu")
            assert chat.model.lm_head.weight.dtype == (torch.float16 if name == "published" else torch.float32)
            inputs = chat.processor(text=chat.prompt([user_turn("?", [WIDE])]), images=[WIDE], return_tensors="pt")
            pixels.append(np.asarray(inputs["pixel_values"])[0])
        stretched, padded = pixels
        assert np.ptp(stretched[0]) < 0.1
        assert np.ptp(padded[0]) > 0.3, "grey bars above and below"


@pytest.mark.parametrize("model", golden.MODELS)
def test_batches_and_single_questions_agree(model: str) -> None:
    chat = loaded(model)
    conversations = [
        [user_turn("What is it?", [WIDE])],
        [user_turn("Tell me something longer.")],
        [user_turn("Hm?", [WIDE] * 2)],
    ]
    one = [chat.answer([c], Decoding(6))[0] for c in conversations]
    assert chat.answer(conversations, Decoding(6)) == one
    candidates = ["yes", "a longer answer", "no"]
    single = [chat.score([c], [a])[0] for c, a in zip(conversations, candidates, strict=True)]
    for (loss, greedy), (expected, expected_greedy) in zip(chat.score(conversations, candidates), single, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("model", golden.MODELS)
def test_the_likeliest_answer_is_greedy(model: str) -> None:
    """The first token that is generated, scored as an answer without end: only a longer text is not the likeliest."""
    chat = loaded(model)
    question = [user_turn("What is it?", [WIDE])]
    (text,) = chat.answer([question], Decoding(24))
    assert chat.score([question], [text])[0][1] is False
    assert chat.score([question], [text])[0][0] < chat.score([question], [text[::-1]])[0][0]


def test_stop_strings_end_an_answer() -> None:
    chat = loaded("qwen2_siglip")
    question = [user_turn("hello there you big friend")]
    (whole,) = chat.answer([question], Decoding(12))
    stop = whole[4:7]
    assert stop in whole
    (cut,) = chat.answer([question], Decoding(12, stop=(stop,)))
    assert cut == whole[: whole.index(stop)].strip()


def test_a_template_without_questions_is_refused() -> None:
    chat = ChatModel.load(str(golden.checkpoint_dir("llama_clip")), Preset(), device="cpu", template="plain")
    with pytest.raises(ValueError, match="give another --template"):
        chat.prompt([user_turn("?")])


def test_the_row_added_for_images_takes_no_probability(tmp_path: Path) -> None:
    """A LLaVA export scores answers as the Ross format does, though its vocabulary has a token more."""
    stored = make_variant(tmp_path, "qwen2_siglip")
    export_checkpoint(stored.path, tmp_path / "llava", "llava", templates=chat_template)
    exported = ChatModel.load(str(tmp_path / "llava"), Preset(), device="cpu")
    assert exported.model.lm_head.weight.shape[0] > loaded("qwen2_siglip").model.lm_head.weight.shape[0]
    question, answers = [user_turn("What is it?", [WIDE])], ["a cat"]
    ((loss, _),) = loaded("qwen2_siglip").score([question], answers)
    assert exported.score([question], answers)[0][0] == pytest.approx(loss, abs=1e-5)

"""The named settings of the published evaluation, written out, and what each of them does to an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ross.evaluation.builtin import mmvp, pope
from megatron_ross.evaluation.builtin.run import MMVP_DECODING, POPE_DECODING
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.lmms_eval.decoding import task_decoding
from megatron_ross.evaluation.lmms_eval.run import OCR_TOKENS
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.presets import FRAMEWORKS, PRESETS, Preset, preset
from megatron_ross.evaluation.prompts import user_turn
from megatron_ross.evaluation.vlmevalkit import adapter
from megatron_ross.huggingface.chat_templates import chat_template


def test_published_presets() -> None:
    """Every field is written out, so that a changed default is seen here."""
    assert PRESETS["published"] == {
        "builtin": Preset(
            dtype="fp16",
            image_markers="joined",
            aspect_ratio="checkpoint",
            templates={},
            task_stop_strings=True,
            turn_end_as_text=False,
            task_answer_blank=False,
            ocr_tokens=False,
            sample_mmvp=True,
        ),
        "lmms-eval": Preset(
            dtype="fp16",
            image_markers="joined",
            aspect_ratio="checkpoint",
            templates={},
            task_stop_strings=False,
            turn_end_as_text=False,
            task_answer_blank=True,
            ocr_tokens=True,
            sample_mmvp=False,
        ),
        "vlmevalkit": Preset(
            dtype="fp16",
            image_markers="in_order",
            aspect_ratio="pad",
            templates={"v1": "llava_v1"},
            task_stop_strings=True,
            turn_end_as_text=True,
            task_answer_blank=False,
            ocr_tokens=False,
            sample_mmvp=False,
        ),
    }


def test_default_presets() -> None:
    trained = Preset(
        dtype="auto",
        image_markers="training",
        aspect_ratio="checkpoint",
        templates={},
        task_stop_strings=True,
        turn_end_as_text=False,
        task_answer_blank=False,
        ocr_tokens=False,
        sample_mmvp=False,
    )
    assert PRESETS["default"] == dict.fromkeys(FRAMEWORKS, trained)
    with pytest.raises(ValueError, match="preset 'paper' is unknown; use default, published"):
        preset("paper", "builtin")


def test_decoding_of_every_framework() -> None:
    """MMVP's published script samples; all else is greedy."""
    assert Decoding(max_new_tokens=16, temperature=0.7, top_p=0.8, top_k=20, stop=()) == mmvp.PUBLISHED
    assert mmvp.GREEDY == POPE_DECODING == Decoding(16, temperature=0.0, top_p=1.0, top_k=0, stop=())
    assert MMVP_DECODING == {"greedy": mmvp.GREEDY, "published": mmvp.PUBLISHED}
    assert Decoding(512, temperature=0.0, top_p=1.0, top_k=0, stop=()) == adapter.DECODING
    assert pope.PROMPTS["short"] == "{text}\nAnswer the question using a single word or phrase."


def test_textvqa_override() -> None:
    wording = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase.", "ocr": True}
    assert {"textvqa_val": {"lmms_eval_specific_kwargs": {"default": wording}}} == OCR_TOKENS


@pytest.mark.parametrize(
    ("gen_kwargs", "decoding"),
    [
        ({}, Decoding(max_new_tokens=1024)),
        ({"max_new_tokens": 16, "temperature": 0, "num_beams": 1, "until": ["\n\n"]}, Decoding(16, stop=("\n\n",))),
        ({"until": "ASSISTANT:", "do_sample": False, "temperature": 0.7}, Decoding(1024, stop=("ASSISTANT:",))),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "until": ["", "x"]}, Decoding(1024, 0.7, 0.8, 20, ("x",))),
        ({"temperature": None, "top_p": None, "num_beams": None, "unknown": 1}, Decoding(1024)),
    ],
)
def test_generation_kwargs_of_a_task(gen_kwargs: dict[str, Any], decoding: Decoding) -> None:
    assert task_decoding(gen_kwargs, preset("default", "lmms-eval")) == decoding


def test_beam_search_is_refused() -> None:
    with pytest.raises(ValueError, match="a task asks for num_beams 5; only sampling and greedy"):
        task_decoding({"num_beams": 5}, Preset())


class Words:
    """Processor and model that know one answer, whatever is asked; `options` are the last ones of `generate`."""

    tokenizer = "the tokenizer"
    chat_template = chat_template("v1")
    device = "cpu"

    def __init__(self, answer: str) -> None:
        self.spoken, self.options = answer, dict[str, Any]()

    def __call__(self, text: list[str], **_: Any) -> Any:
        return Inputs(input_ids=torch.zeros(len(text), 1, dtype=torch.long))

    def apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool, **_: Any) -> str:
        texts = [f"{m['role']}: {m['content']}" + ("</s>" if m["role"] == "assistant" else " ") for m in messages]
        return "".join(texts) + ("assistant:" if add_generation_prompt else "")

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.options = options
        return input_ids

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return [self.spoken] * len(ids)


class Inputs(dict[str, torch.Tensor]):
    """A processor's output."""

    def to(self, device: str) -> Inputs:
        return self


def answer(framework: Any, name: str, decoding: Decoding, spoken: str) -> tuple[str, dict[str, Any]]:
    """What a preset makes of a model's words, and what was asked of `generate`."""
    words = Words(spoken)
    (given,) = ChatModel(words, words, preset(name, framework)).answer([[user_turn("?")]], decoding)
    return given, words.options


@pytest.mark.parametrize(("name", "expected"), [("default", "Red."), ("published", "Red.\n\nASSISTANT: Blue.")])
def test_stop_strings_of_a_task_count_by_default_only(name: str, expected: str) -> None:
    """The published code reads lmms-eval's `until` and does not apply it."""
    decoding = task_decoding({"until": ["\n\n", "ASSISTANT:"]}, preset(name, "lmms-eval"))
    given, options = answer("lmms-eval", name, decoding, "Red.\n\nASSISTANT: Blue.")
    assert given == expected
    stops = {"stop_strings": ["\n\n", "ASSISTANT:"], "tokenizer": "the tokenizer"} if name == "default" else {}
    assert {key: options.get(key) for key in ("stop_strings", "tokenizer") if key in options} == stops
    assert options["max_new_tokens"] == 1024


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_written_out_end_of_turn_counts_in_published_vlmevalkit_only(name: str, framework: Any) -> None:
    given, options = answer(framework, name, Decoding(8), "Red.</s>user: And?")
    if (name, framework) == ("published", "vlmevalkit"):
        assert given == "Red."
        assert options["stop_strings"] == ["</s>"]
    else:
        assert given == "Red.</s>user: And?"
        assert "stop_strings" not in options

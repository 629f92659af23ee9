"""Asks an export with stock transformers, of whichever version is imported; run by tests in a process of its own.

    python ask_transformers.py FOLDER QUESTIONS.json ANSWERS.json

Writes one JSON object; some versions print hints of their own. Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline


def conversation(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The question with its picture as a path."""
    content = [{"type": "image", "path": answer["picture"]}, {"type": "text", "text": answer["question"]}]
    return [{"role": "user", "content": content}]


def ask_llava(folder: str, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Prompts and tokens of single questions, of a batch of all, of a rendered text, and the pipeline's texts."""
    processor = AutoProcessor.from_pretrained(folder)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    tokens = questions[0]["max_new_tokens"]

    def generate(inputs: Any) -> list[list[int]]:
        output = model.generate(**inputs, max_new_tokens=tokens)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    single = [processor.apply_chat_template(conversation(q), **options) for q in questions]
    batch = processor.apply_chat_template([conversation(q) for q in questions], **options, padding=True)
    texts = [processor.apply_chat_template(conversation(q), add_generation_prompt=True) for q in questions]
    images = [Image.open(q["picture"]).convert("RGB") for q in questions]
    rendered = processor(text=texts, images=images, padding=True, return_tensors="pt")
    ask = pipeline("image-text-to-text", model=folder, device="cpu")
    answered = [ask(text=conversation(q), max_new_tokens=tokens, return_full_text=False) for q in questions]
    return {
        "left_over": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "prompts": [inputs["input_ids"][0].tolist() for inputs in single],
        "tokens": [generate(inputs)[0] for inputs in single],
        "batch": generate(batch),
        "rendered": generate(rendered),
        "pipeline": [answer[0]["generated_text"] for answer in answered],
        "image_processor": type(processor.image_processor).__name__,
    }


def ask_language_model(folder: str, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy tokens of the language model inside a `ross` export, whose config names it under the stock type."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer([q["text"] for q in questions], padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=questions[0]["max_new_tokens"], do_sample=False)
    return {"tokens": output[:, inputs["input_ids"].shape[1] :].tolist()}


def tokenizer_facts(folder: str) -> dict[str, Any]:
    """What a stock user sees of the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("padding_side", "pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id", "model_input_names")
    text = "USER: What is  this?\nASSISTANT: A cat, 12 dogs."
    return {name: getattr(tokenizer, name) for name in names} | {
        "special": sorted(tokenizer.all_special_ids),
        "ids": tokenizer(text).input_ids,
        "inputs": sorted(tokenizer(text)),
        "chat_template": tokenizer.chat_template,
    }


if __name__ == "__main__":
    arguments = json.loads(Path(sys.argv[2]).read_text())
    result = {"version": transformers.__version__, "tokenizer": tokenizer_facts(sys.argv[1])}
    kind = json.loads((Path(sys.argv[1]) / "config.json").read_text())["model_type"]
    result |= (ask_llava if kind == "llava" else ask_language_model)(sys.argv[1], arguments)
    Path(sys.argv[3]).write_text(json.dumps(result))

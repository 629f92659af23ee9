"""Exports in stock transformers 4.57 and in 5: the same prompts, the tokens of our program, singly and in batches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ross.data.images import ImageProcessor
from megatron_ross.evaluation.generate import load_for_inference, open_image
from megatron_ross.huggingface import RossProcessor
from megatron_ross.huggingface.chat_templates import chat_template
from tests.helpers.clients import ENVIRONMENT, MAX_NEW_TOKENS, Asked, needs, our_answer
from tests.helpers.golden import GOLDEN
from tests.helpers.random_llava import MODELS

pytestmark = pytest.mark.clients
SCRIPT = Path(__file__).parent / "ask_transformers.py"
PHOTOS = ("landscape.png", "portrait.jpg", "thin.png", "square.png")


def ask(folder: Path, questions: list[dict[str, Any]], major: int, environment: dict[str, str], tmp_path: Path) -> Any:
    """The script's answers from one major version of transformers."""
    if major == 4:
        needs("transformers-4")
        environment = environment | {"PYTHONPATH": str(ENVIRONMENT / "transformers-4")}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([question | {"max_new_tokens": MAX_NEW_TOKENS} for question in questions]))
    answers = tmp_path / "answers.json"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), str(path), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(answers.read_text())
    assert said["version"].startswith(f"{major}.")
    return said


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("major", [4, 5])
def test_llava_answers_as_ours(
    major: int, model: str, asked: Callable[[str], Asked], client_environment: dict[str, str], tmp_path: Path
) -> None:
    ours = asked(model)
    questions = [answer.__dict__ for answer in ours.answers]
    said = ask(ours.exports["llava"], questions, major, client_environment, tmp_path)
    assert said["left_over"] == {}
    assert said["prompts"] == [answer.prompt for answer in ours.answers]
    for way in ("tokens", "batch", "rendered"):
        assert said[way] == [answer.tokens for answer in ours.answers], way
    assert [text.strip() for text in said["pipeline"]] == [answer.text.strip() for answer in ours.answers]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", ["llava", "ross"])
def test_both_versions_read_the_same_tokenizer(
    format: str, model: str, asked: Callable[[str], Asked], client_environment: dict[str, str], tmp_path: Path
) -> None:
    """In 4.57 the `ross` folder is read as its language model; our classes need transformers 5."""
    folder = asked(model).exports[format]
    config = json.loads((folder / "config.json").read_text())
    stock = tmp_path / "stock"
    stock.mkdir()
    for file in folder.iterdir():
        (stock / file.name).symlink_to(file)
    if format == "ross":
        (stock / "config.json").unlink()
        plain = config | {"model_type": config["model_type"].removeprefix("ross_"), "auto_map": {}}
        (stock / "config.json").write_text(json.dumps(plain))
    texts = ["USER: What is it? ASSISTANT:", "USER: How many dogs are there, and where? ASSISTANT:"]
    questions = [answer.__dict__ | {"text": text} for answer, text in zip(asked(model).answers, texts, strict=False)]
    four, five = (ask(stock, questions, major, client_environment, tmp_path) for major in (4, 5))
    assert four["tokenizer"] == five["tokenizer"]
    facts = five["tokenizer"]
    assert (facts["padding_side"], facts["inputs"]) == ("left", ["attention_mask", "input_ids"])
    assert facts["pad_token_id"] == config["pad_token_id"]
    assert facts["chat_template"] == chat_template("qwen_2" if model == "qwen2_siglip" else "v1")
    assert four["tokens"] == five["tokens"]
    if format == "ross":
        assert four["tokens"] == _language_model_tokens(stock, texts)


def _language_model_tokens(folder: Path, texts: list[str]) -> list[list[int]]:
    """One at a time, unpadded."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize("model", MODELS)
def test_the_tool_says_what_is_compared(model: str, asked: Callable[[str], Asked]) -> None:
    """tools/generate.py itself, once per format."""
    answer = asked(model).answers[0]
    tool = Path(__file__).parents[2] / "tools" / "generate.py"
    for folder in asked(model).exports.values():
        options = {"--checkpoint": folder, "--image": answer.picture, "--question": answer.question}
        options["--max-new-tokens"] = MAX_NEW_TOKENS
        command = [sys.executable, str(tool), *(str(part) for option in options.items() for part in option)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == answer.text.strip()


@pytest.mark.parametrize("model", MODELS)
def test_mistakes_change_the_answers(model: str, asked: Callable[[str], Asked], tmp_path: Path) -> None:
    """Equal tokens mean something: another template, tower layer, picture or question gives others."""
    ours = asked(model)
    answers = {tuple(answer.tokens) for answer in ours.answers}
    assert len(answers) == len(ours.answers)
    first = ours.answers[0]
    network, processor = load_for_inference(str(ours.exports["llava"]), device="cpu")
    processor.chat_template = chat_template("v1" if model == "qwen2_siglip" else "llava_v1")
    assert our_answer(network, processor, Path(first.picture), first.question).tokens != first.tokens
    network, processor = load_for_inference(str(ours.exports["llava"]), device="cpu")
    network.model.config.vision_feature_layer = network.config.vision_feature_layer = -1
    assert our_answer(network, processor, Path(first.picture), first.question).tokens != first.tokens


@pytest.mark.parametrize("model", MODELS)
def test_pixels_where_torchvision_is_installed(
    model: str, asked: Callable[[str], Asked], client_environment: dict[str, str], tmp_path: Path
) -> None:
    """Ours, and those of the processor that the folder brings, are training's. Stock ones are up to 2/255 off."""
    needs("vllm")
    exports = asked(model).exports
    training: ImageProcessor = RossProcessor.from_pretrained(exports["ross"]).image_transform
    photos = [GOLDEN / "preprocess" / "images" / name for name in PHOTOS]
    script = Path(__file__).parent / "make_pixels.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(exports["llava"]), str(tmp_path / "out"), *map(str, photos)],
        capture_output=True,
        text=True,
        env=client_environment | {"PYTHONPATH": str(ENVIRONMENT / "with-torchvision")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out")
    for number, photo in enumerate(photos):
        expected = training(open_image(photo))
        for kind in ("ours", "named"):
            torch.testing.assert_close(found[f"{kind}.{number}"], expected, rtol=0, atol=1e-6)
        off = (found[f"stock.{number}"] - expected).abs()
        assert float(off.max()) < 2.01 / 255 / min(training.std)
        assert float((off > 1e-4).float().mean()) < 0.02
    assert done.stdout.splitlines()[-1] == "LlavaImageProcessor LlavaImageProcessorPillow LlavaImageProcessorPil"

"""tools/generate.py and the chat session behind it, on the golden checkpoints."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_ross.data.images import decode_image
from megatron_ross.evaluation.generate import (
    ChatSession,
    chat_loop,
    load_for_inference,
    model_rgb,
    open_image,
)
from megatron_ross.evaluation.options import Decoding
from tests.helpers import golden

ROOT = Path(__file__).resolve().parents[3]
IMAGES = golden.GOLDEN / "preprocess" / "images"


@functools.cache
def loaded(model: str) -> tuple[Any, Any]:
    return load_for_inference(str(golden.checkpoint_dir(model)), device="cpu")


def session(model: str, max_new_tokens: int = 16) -> ChatSession:
    return ChatSession(*loaded(model), Decoding(max_new_tokens))


def record(model: str) -> dict[str, Any]:
    return json.loads((golden.GOLDEN / "goldens" / model / "greedy_generation.json").read_text())[0]


def question(model: str) -> str:
    return record(model)["prompt"].split("<image>\n")[1].split(" ASSISTANT:")[0]


def expected_answer(model: str) -> str:
    return loaded(model)[1].decode(record(model)["generated"], skip_special_tokens=True).strip()


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """tools/generate.py as users start it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")


def run_tool(*arguments: str) -> int:
    """Exit status of its `main`, in this process."""
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


@pytest.mark.parametrize("model", golden.MODELS)
def test_greedy_answer_is_the_golden_one(model: str) -> None:
    chat = session(model)
    answer = chat.ask(question(model), [open_image(IMAGES / record(model)["image"])])
    assert answer == expected_answer(model)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_follow_up_questions_see_the_history_and_all_images() -> None:
    chat = session("qwen2_siglip", 4)
    first = chat.ask("What is it?", [open_image(IMAGES / "square.png")])
    prompts: list[dict[str, Any]] = []
    generate = chat.model.generate

    class Spy:
        device, config = chat.model.device, chat.model.config

        def generate(self, **inputs: Any) -> Any:
            prompts.append(inputs)
            return generate(**inputs)

    chat.model = Spy()
    chat.ask("And this?", [open_image(IMAGES / "tiny.png")])
    text = chat.processor.decode(prompts[0]["input_ids"][0])
    assert "USER: \nWhat is it? ASSISTANT: " + first in text
    assert text.endswith("USER: \nAnd this? ASSISTANT:")
    assert prompts[0]["pixel_values"].shape[0] == 2
    chat.reset()
    assert (chat.messages, chat.images) == ([], [])


def test_sampling_is_repeatable_and_differs_from_greedy() -> None:
    chat = ChatSession(*loaded("qwen2_siglip"), Decoding(12, temperature=5.0, top_p=0.99))
    answers = []
    for seed in (1, 1, 2):
        chat.reset()
        torch.manual_seed(seed)
        answers.append(chat.ask("hello"))
    assert answers[0] == answers[1] != answers[2]


def test_chat_loop_commands() -> None:
    lines = iter(
        ["/image " + str(IMAGES / "square.png"), "What?", "/image missing.png", "/dance", "", "/reset", "/quit"]
    )
    chat, shown = session("llama_clip", 2), []
    images_at_reset: list[int] = []
    reset = chat.reset
    chat.reset = lambda: (images_at_reset.append(len(chat.images)), reset())[1]  # type: ignore[method-assign]
    chat_loop(chat, lambda: next(lines), shown.append)
    assert images_at_reset == [1]
    assert any("missing.png" in line and line.startswith("error:") for line in shown)
    assert any("unknown command /dance" in line for line in shown)
    assert len(shown) == 4  # help, answer, two complaints


def test_chat_loop_ends_with_the_input() -> None:
    def read() -> str:
        raise EOFError

    chat_loop(session("llama_clip"), read, lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "max-new-tokens is 0"), ((1, -0.5), "temperature is -0.5"), ((1, 1.0, 0.0), "top-p is 0.0")],
)
def test_impossible_decoding_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(*arguments)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        load_for_inference(str(golden.checkpoint_dir("llama_clip")), dtype="int8")


def test_tool_streams_the_golden_answer() -> None:
    model = "qwen2_siglip"
    done = run_script(
        *("--checkpoint", str(golden.checkpoint_dir(model)), "--image", str(IMAGES / record(model)["image"])),
        *("--question", question(model), "--max-new-tokens", "16", "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected_answer(model)


def test_tool_chats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/dance\n"))
    folder = str(golden.checkpoint_dir("llama_clip"))
    assert run_tool("--checkpoint", folder, "--max-new-tokens", "2", "--device", "cpu") == 0
    assert "unknown command /dance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", str(golden.GOLDEN / "llm_qwen2"), "--question", "hi"], "(model_type 'qwen2'); make"),
        (
            ["--checkpoint", str(golden.checkpoint_dir("llama_clip")), "--image", str(golden.GOLDEN / "README.md")],
            "README.md' cannot be decoded",
        ),
    ],
)
def test_tool_tells_mistakes_on_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(*arguments) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize("conversion", ["published", "viewer", None])
def test_a_model_is_shown_rgb_as_it_was_trained(conversion: str | None) -> None:
    config = SimpleNamespace() if conversion is None else SimpleNamespace(image_conversion=conversion)
    picture = open_image(IMAGES / "rgba.png")
    shown = model_rgb(SimpleNamespace(config=config), picture)
    expected = decode_image((IMAGES / "rgba.png").read_bytes(), "rgba.png", conversion or "published")
    assert shown.mode == "RGB"
    assert shown.tobytes() == expected.tobytes()
    assert (shown.tobytes() == Image.open(IMAGES / "rgba.png").convert("RGB").tobytes()) == (conversion != "viewer")


def test_open_image_refuses_what_cannot_be_decoded(tmp_path: Path) -> None:
    data = (IMAGES / "rgba.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half\.png' cannot be decoded"):
        open_image(tmp_path / "half.png")

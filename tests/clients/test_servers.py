"""Exports in vLLM, offline and behind its OpenAI interface, and in `transformers serve`: our prompts, our tokens.

Pictures come as `data:` addresses and from a web server on this machine.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from tests.helpers.clients import ENVIRONMENT, MAX_NEW_TOKENS, Answer, Asked, needs
from tests.helpers.random_llava import MODELS

pytestmark = pytest.mark.clients
START_SECONDS = 400
ANSWER_SECONDS = 200
SERVING_TEMPLATE = "chat_template_with_begin_token.jinja"
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_TARGET_DEVICE": "cpu",
    "PYTHONPATH": str(ENVIRONMENT / "with-torchvision"),
}


@pytest.mark.parametrize("model", MODELS)
def test_vllm_offline(
    model: str, asked: Callable[[str], Asked], client_environment: dict[str, str], tmp_path: Path
) -> None:
    needs("vllm")
    ours = asked(model)
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([a.__dict__ | {"max_new_tokens": MAX_NEW_TOKENS} for a in ours.answers]))
    script = Path(__file__).parent / "ask_vllm.py"
    done = subprocess.run(
        [sys.executable, str(script), str(ours.exports["llava"]), str(questions)],
        capture_output=True,
        text=True,
        env=client_environment | VLLM_SETTINGS,
        timeout=START_SECONDS + ANSWER_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["prompts"] == [answer.prompt for answer in ours.answers]
    assert said["tokens"] == [answer.tokens for answer in ours.answers]


@pytest.mark.parametrize("model", MODELS)
def test_vllm_server(
    model: str,
    asked: Callable[[str], Asked],
    addresses: dict[str, str],
    client_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """As the card says; but the command `vllm` of the package for CPUs looks for its version under another name."""
    needs("vllm")
    ours = asked(model)
    folder = ours.exports["llava"]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "2"]
    if (folder / SERVING_TEMPLATE).is_file():
        options += ["--chat-template", str(folder / SERVING_TEMPLATE)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    with serving(command, client_environment | VLLM_SETTINGS, tmp_path / "log.txt") as address:
        for answer in ours.answers:
            for source in (data_address(answer.picture), addresses[answer.picture]):
                said = complete(address, str(folder), answer, source, return_token_ids=True)
                assert said["prompt_token_ids"] == answer.prompt
                assert said["choices"][0]["token_ids"] == answer.tokens


@pytest.mark.parametrize("model", MODELS)
def test_transformers_serve(
    model: str,
    asked: Callable[[str], Asked],
    addresses: dict[str, str],
    client_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """It tells texts and the number of prompt tokens, no ids."""
    ours = asked(model)
    folder = str(ours.exports["llava"])
    command = [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--device", "cpu"]
    with serving([*command, "--dtype", "float32"], client_environment, tmp_path / "log.txt") as address:
        for answer in ours.answers:
            for source in (data_address(answer.picture), addresses[answer.picture]):
                said = complete(address, folder, answer, source)
                assert said["choices"][0]["message"]["content"].strip() == answer.text.strip()
                assert said["usage"]["prompt_tokens"] == len(answer.prompt)


@contextmanager
def serving(command: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """Address of a server that is ready, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(f"{process.args[:3]} did not start: {log.read_text(errors='replace')[-4000:]}")


def complete(address: str, model: str, answer: Answer, source: str, **options: Any) -> dict[str, Any]:
    """One chat completion, greedy."""
    content = [{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": answer.question}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        **options,
    }
    headers = {"Content-Type": "application/json"}
    request = Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=ANSWER_SECONDS) as reply:
            return json.loads(reply.read())
    except HTTPError as error:
        pytest.fail(f"{error}: {error.read().decode(errors='replace')[:2000]}")


def data_address(picture: str) -> str:
    """The picture itself in an address."""
    return "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()

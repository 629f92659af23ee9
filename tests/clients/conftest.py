"""Random exports, and what our own program answers about pictures, for clients to be compared with."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.evaluation.generate import load_for_inference, open_image
from tests.helpers.clients import ENVIRONMENT, QUESTIONS, Asked, our_answer
from tests.helpers.golden import GOLDEN
from tests.helpers.random_llava import make_exports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests in an environment that tools/setup_clients.sh has not made."""
    if not (ENVIRONMENT / "transformers-4").exists() and not list(ENVIRONMENT.glob("no-*.txt")):
        for item in items:
            if item.get_closest_marker("clients"):
                item.add_marker(pytest.mark.skip(reason="needs an environment of its own: make test-clients"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pieces of a photograph that no processor resizes: as large as the tower's input, and too low, which is padded.

    transformers resizes with torchvision where that is installed, by up to 2/255 off what Pillow makes; another test
    looks at that.
    """
    folder = tmp_path_factory.mktemp("pictures")
    photo = open_image(GOLDEN / "preprocess" / "images" / "landscape.png")
    for name, box in (("square.png", (40, 30, 110, 100)), ("low.png", (90, 60, 160, 102))):
        photo.crop(box).save(folder / name)
    return [folder / "square.png", folder / "low.png"]


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory, pictures: list[Path]) -> Callable[[str], Asked]:
    """`asked("llama_clip")`; our answers are those of tools/generate.py."""

    @functools.cache
    def get(model: str) -> Asked:
        exports = make_exports(tmp_path_factory.mktemp("exports"), model)
        loaded = load_for_inference(str(exports["llava"]), device="cpu")
        answers = [our_answer(*loaded, picture, question) for picture in pictures for question in QUESTIONS]
        return Asked(exports, answers)

    return get


@pytest.fixture(scope="session")
def addresses(pictures: list[Path]) -> Iterator[dict[str, str]]:
    """http addresses on this machine of the pictures, by path."""
    handler = functools.partial(_Quiet, directory=str(pictures[0].parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {str(path): f"http://127.0.0.1:{server.server_port}/{path.name}" for path in pictures}
    server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def client_environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables of a client: no network, one thread, caches of its own, no code of ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HOME")}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}

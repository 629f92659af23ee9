"""Quickstart components: small but genuine Hugging Face models, made at the same time on the available cores.

Writes under --output:

    llm/            Qwen2ForCausalLM and Qwen2Tokenizer (transformers); pretrained on text, see toy_llm.py
    vision_tower/   SiglipVisionModel and its image processor (transformers); pretrained on the images, see toy_tower.py
    vae/            AutoencoderKL with FLUX.1's structure (diffusers), see toy_vae.py

Like the parts of a real run these are pretrained, within a minute or so each and on nothing but the quickstart's own
scenes. None of them has seen a held-out image, and language model and tower have never met.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from jsonargparse import auto_cli
from toy_llm import make_llm
from toy_tower import make_tower
from toy_vae import make_vae


def make_components(data: Path, output: Path, seed: int = 0) -> None:
    """Make language model, vision tower and auto-encoder.

    Args:
        data: folder that make_data.py wrote.
        output: folder to write into.
        seed: everything follows from it.
    """
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(make_llm, output / "llm", seed),
            pool.submit(make_tower, data, output / "vision_tower", seed),
            pool.submit(make_vae, data, output / "vae", seed),
        ]
        summaries = [job.result() for job in jobs]
    print(*summaries, sep="\n")


if __name__ == "__main__":
    auto_cli(make_components, as_positional=False)

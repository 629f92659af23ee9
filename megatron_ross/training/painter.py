"""Pictures beside training: painted in a thread, from copies, while the run goes on."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ross.data.run_files import RunFiles
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.pictures import below_each_other, side_by_side, to_pil
from megatron_ross.models.reconstruction import ReconstructionHead
from megatron_ross.threads import in_thread


class Painter:
    """On the one rank that paints. At most one set of pictures is in work.

    The thread has its own CUDA stream and a copy of the denoiser; the VAE is frozen and shared. It decodes image by
    image, because its memory comes on top of a training step's. On a GPU, its products take TF32 whenever the training
    thread has switched it on, which is a switch of the whole process: pictures differ by that much from run to run.

    Args:
        head: the model's; its `sample_latents` paints.
        load_encoder: loads the VAE where the head has none (`latent_cache`).
        respacing: sampling steps, see `sample_latents`.
        files: writes the pictures.
    """

    def __init__(
        self, head: ReconstructionHead, load_encoder: Callable[[], LatentEncoder], respacing: str, files: RunFiles
    ) -> None:
        self._head, self._load_encoder, self._respacing, self._files = head, load_encoder, respacing, files
        self._encoder = head.latent_encoder
        self._work: Future[None] | None = None

    def start(self, conditions: Tensor, pixels: Tensor, path: Path) -> None:
        """Begin to paint; what was in work is finished first. Call it without gradients, in eval mode.

        Args:
            conditions: of the images [n, N, h].
            pixels: the images, as the tower sees them [n, 3, P, P].
            path: PNG file, a row per image: input, round trip through the VAE, reconstruction.

        Raises:
            Exception: what went wrong with the pictures before.
        """
        self.finish()
        if self._encoder is None:
            self._encoder = self._load_encoder().to(conditions.device)
        head, seeds = self._head, range(len(pixels))
        if head.objective == "regress":  # one pass, which switches TF32: not beside training
            latents = head.sample_latents(conditions, self._respacing, seeds)
            sample: Callable[[], Tensor] = latents.clone  # painted already
        else:
            sample = partial(head.sample_latents, conditions, self._respacing, seeds, copy.deepcopy(head.denoiser))
        stream = _side_stream(conditions.device)
        self._work = in_thread(partial(self._paint, sample, pixels, path, stream), "painter")

    def finish(self) -> None:
        """Wait for what is in work. Raises what went wrong with it."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    @torch.no_grad()
    def _paint(
        self, sample: Callable[[], Tensor], pixels: Tensor, path: Path, stream: torch.cuda.Stream | None
    ) -> None:
        assert self._encoder is not None
        encoder = self._encoder
        with torch.cuda.stream(stream):  # None: no effect
            rows = []
            for image, latents in zip(pixels.split(1), sample().split(1), strict=True):
                panels = (encoder.vae_input(image), encoder.round_trip(image), encoder.decode_latents(latents))
                rows.append(side_by_side([to_pil(panel)[0] for panel in panels]))
        unfinished = path.with_name(path.name + ".partial")
        with self._files.writing(path):
            path.parent.mkdir(exist_ok=True)
            below_each_other(rows).save(unfinished, format="PNG")
            os.replace(unfinished, path)


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that begins where the present one is now."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream

"""NVIDIA DALI instead of Pillow: decode, pad and resize a batch of images in one pipeline.

The only file that imports DALI, an optional dependency. With a GPU, JPEG decoding runs on it ("mixed"), else everything
runs on CPU threads outside Python. Only what DALI treats nearly as Pillow does goes through it: 8-bit RGB and grey JPEG
and PNG files with an intact end that are not enlarged (Pillow clips overshoots between its two passes, DALI does not;
that shows when enlarging), and that no EXIF orientation turns and no transparency touches, unless `image_conversion`
ignores both. Everything else, and every file that DALI stumbles over, goes to Pillow one by one, which
also finds the words for what is wrong with a broken file.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ross.data.batch import ImageSpan
from megatron_ross.data.decoders import PillowDecoder
from megatron_ross.data.errors import ImageError
from megatron_ross.data.images import MAX_PIXELS, ImageProcessor, check_scans
from megatron_ross.data.rgb import is_plain

_FILE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 64  # where an intact file's end mark must be; anything odd goes to Pillow
_MODES = ("RGB", "L")


@dataclass(frozen=True)
class _Geometry:
    """Per image, all (height, width): the padded square's corner and size, the size to resize to, the final crop."""

    pad_start: tuple[int, int]
    pad_shape: tuple[int, int]
    resize: tuple[int, int]
    crop_start: tuple[int, int]


_Encoded = tuple[int, bytes, _Geometry]
"""An image's place among those to decode, its file, and what to do with it."""


class DaliDecoder:
    """A PixelDecoder; pixels are on the GPU if there is one.

    On a CPU every thread has a pipeline of its own that takes one image at a time, which is as fast as batches: a
    broken file in a batch leaves tasks of the others behind in DALI's thread pool, and they crash the process (seen
    with DALI 2.4 and fuzzed files). nvJPEG needs batches, so on a GPU one pipeline takes `max_batch_size` images.
    """

    def __init__(
        self, processor: ImageProcessor, *, num_threads: int = 4, max_batch_size: int = 32, device_id: int | None = None
    ):
        """
        Args:
            max_batch_size: images that a GPU decodes at a time.
            device_id: GPU to decode on; None uses the CPU.

        Raises:
            ValueError: DALI is not installed.
        """
        self._processor = processor
        self._device_id = device_id
        on_gpu = device_id is not None
        self._batch_size, self._num_threads, num_pipelines = (
            (max_batch_size, num_threads, 1) if on_gpu else (1, 1, num_threads)
        )
        self._pool = ThreadPoolExecutor(num_pipelines, thread_name_prefix="ross-dali")
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._dali = _import_dali()
        self._pillow = PillowDecoder(num_threads)
        self.num_fallbacks = 0
        """Images that went to Pillow so far."""

    def decode(self, spans: Sequence[ImageSpan]) -> list[Tensor | ImageError]:
        results: dict[int, Tensor | ImageError] = {}
        ready: list[_Encoded] = []
        for i, span in enumerate(spans):
            data = _read(span)
            geometry = plan_geometry(data, self._processor) if data is not None else None
            if data is not None and geometry is not None:
                ready.append((i, data, geometry))
        batches = [ready[begin : begin + self._batch_size] for begin in range(0, len(ready), self._batch_size)]
        for batch, decoded in zip(batches, self._pool.map(self._run, batches), strict=True):
            results |= {i: pixels for (i, _, _), pixels in zip(batch, decoded, strict=True) if pixels is not None}
        rest = [i for i in range(len(spans)) if i not in results]
        with self._lock:
            self.num_fallbacks += len(rest)
        results |= zip(rest, self._pillow.decode([spans[i] for i in rest]), strict=True)
        device = torch.device("cpu" if self._device_id is None else f"cuda:{self._device_id}")
        return [r if isinstance(r, ImageError) else r.to(device) for _, r in sorted(results.items())]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._pillow.close()

    def _run(self, batch: Sequence[_Encoded]) -> list[Tensor | None]:
        """Pixels per image, None for those that DALI cannot decode.

        A broken file fails its whole batch, which is then tried again in halves: what becomes of an image must not
        depend on its neighbours, or another layout would skip other samples (Pillow refuses some that DALI takes).
        """
        try:
            return list(self._run_batch(batch))
        except RuntimeError:  # DALI's own errors derive from it; Pillow will say what is wrong
            self._mine.pipeline = None  # a failed pipeline is lost
        if len(batch) == 1:
            return [None]
        half = len(batch) // 2
        return self._run(batch[:half]) + self._run(batch[half:])

    def _run_batch(self, batch: Sequence[_Encoded]) -> list[Tensor]:
        pipeline = getattr(self._mine, "pipeline", None) or self._build()
        self._mine.pipeline = pipeline
        feeds = {
            "encoded": [np.frombuffer(data, dtype=np.uint8) for _, data, _ in batch],
            "resize": [np.array(g.resize, dtype=np.float32) for _, _, g in batch],
        }
        if self._processor.mode == "pad":
            feeds["pad_start"] = [np.array(g.pad_start, dtype=np.int32) for _, _, g in batch]
            feeds["pad_shape"] = [np.array(g.pad_shape, dtype=np.int32) for _, _, g in batch]
        if self._processor.resize == "crop":
            feeds["crop_start"] = [np.array(g.crop_start, dtype=np.int32) for _, _, g in batch]
        for name, values in feeds.items():
            pipeline.feed_input(name, values)
        (pixels,) = pipeline.run()
        if self._device_id is None:  # numpy normalises faster than DALI's CPU operator, and 8 bits are less to copy
            return [self._processor.normalise(image) for image in pixels.as_array()]
        images = torch.from_dlpack(pixels.as_tensor()).permute(0, 3, 1, 2).float() / 255
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self._processor.mean, self._processor.std)
        )
        return list((images - mean) / std)

    def _build(self) -> Any:
        pipeline = self._dali.pipeline_def(
            _graph,
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )(self._dali, self._processor, self._device_id is not None)
        pipeline.build()
        return pipeline


def _import_dali() -> Any:
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise ValueError(
            "the DALI image decoder needs NVIDIA DALI; install the extra `dali` (pip install -e '.[dali]') "
            "or choose the decoder 'pillow'"
        ) from error
    return nvidia.dali


def _graph(dali: Any, processor: ImageProcessor, on_gpu: bool) -> Any:
    """The pipeline's operators: decode, pad, resize, crop. Shapes come per image, from `plan_geometry`.

    Gives uint8 [P, P, 3] per image.
    """
    fn, types = dali.fn, dali.types

    def given(name: str, dtype: Any) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=1)

    image = fn.decoders.image(
        given("encoded", types.UINT8),
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as libjpeg, and so Pillow, does by default
    )
    if processor.mode == "pad":
        image = fn.slice(
            image,
            start=given("pad_start", types.INT32),
            shape=given("pad_shape", types.INT32),
            axes=(0, 1),
            out_of_bounds_policy="pad",
            fill_values=[float(c) for c in processor.pad_colour],
        )
    size = given("resize", types.FLOAT)
    image = fn.resize(image, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
    if processor.resize == "crop":
        side = processor.image_size
        image = fn.slice(image, start=given("crop_start", types.INT32), shape=(side, side), axes=(0, 1))
    return image


def _read(span: ImageSpan) -> bytes | None:
    if span.read_bytes is None:
        return None
    try:
        return span.read_bytes()
    except ImageError:
        return None  # Pillow's path meets the same error and reports it


def plan_geometry(data: bytes, processor: ImageProcessor) -> _Geometry | None:
    """What to do with an image file, from its header alone; None sends it to Pillow."""
    if processor.resample != "bicubic":  # the only filter whose results were compared
        return None
    try:
        check_scans(data)
        with Image.open(io.BytesIO(data), formats=tuple(_FILE_ENDS)) as image:
            width, height = image.size
            kind, mode = image.format or "", image.mode
            is_left_alone = processor.conversion == "published" or is_plain(image, data)
    except Exception:  # whatever is wrong, Pillow's path raises it again and names the file
        return None
    if mode not in _MODES or not is_left_alone or _FILE_ENDS.get(kind, b"\0") not in data[-_TAIL_BYTES:]:
        return None
    start, shape = (0, 0), (height, width)
    if processor.mode == "pad":
        side = max(width, height)
        start, shape = (-((side - height) // 2), -((side - width) // 2)), (side, side)
    size = processor.image_size
    resize = (size, size)
    if processor.resize == "crop":
        shorter = min(shape)
        resize = tuple(size if n == shorter else int(size * n / shorter) for n in shape)  # type: ignore[assignment]
    if shape[0] < resize[0] or shape[1] < resize[1] or shape[0] * shape[1] > MAX_PIXELS:
        return None
    return _Geometry(start, shape, resize, ((resize[0] - size) // 2, (resize[1] - size) // 2))

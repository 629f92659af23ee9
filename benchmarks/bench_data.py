"""Images per second of the data engine (Pillow, DALI) and of a plain PyTorch DataLoader, in one run on the same files.

    python benchmarks/bench_data.py --num_images 512 --num_workers 2 --json data.json

Files are JPEGs of photographs that scikit-image ships, at the sizes of COCO and LLaVA-558k pictures. The plain loader
does the published preprocessing: Pillow decoding, padding, the tower's Hugging Face image processor, one sample at a
time in worker processes. All paths tokenise the same text and end with padded batches. Paths take turns for several
rounds, since machines are noisy; the table shows the fastest and the median round.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import PIL
import torch
from environment import environment
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_ross.data.conversation import encode_conversation
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.decoders import PillowDecoder, PixelDecoder
from megatron_ross.data.images import ImageProcessor, pad_to_square
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.tokenizer import TextTokenizer

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "motorcycle_left", "retina", "hubble_deep_field")
SIZES = ((640, 480), (480, 640), (336, 336), (500, 375), (448, 640), (1024, 768))
NUM_WARMUP = 4
HALF = (0.5, 0.5, 0.5)


def write_files(folder: Path, num_images: int) -> None:
    """`num_images` JPEG crops of the photographs, and one caption record for each."""
    import skimage

    sources = {p.stem: p for p in (Path(skimage.__file__).parent / "data").iterdir()}
    photos = [Image.open(sources[name]).convert("RGB") for name in PHOTOS]
    rng = np.random.default_rng(0)
    records = []
    for i in range(num_images):
        photo, size = photos[i % len(photos)], SIZES[i % len(SIZES)]
        left, top = (float(rng.uniform(0, 0.3)) * n for n in photo.size)
        box = (left, top, left + 0.7 * photo.width, top + 0.7 * photo.height)
        photo.resize(size, Image.Resampling.BICUBIC, box=box).save(folder / f"{i}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": "A photo of things. " * 12},
        ]
        records.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
    (folder / "data.json").write_text(dumps(records))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that needs no file: tokenising costs about what a real one costs per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<|im_end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")


class PlainDataset(torch.utils.data.Dataset):
    """What published training does per sample, in a PyTorch worker process."""

    def __init__(self, dataset: RossDataset, tokenizer: TextTokenizer, folder: Path, image_size: int):
        self._dataset, self._tokenizer, self._folder = dataset, tokenizer, folder
        size = {"height": image_size, "width": image_size}
        self._processor = SiglipImageProcessorPil(size=size, image_mean=HALF, image_std=HALF)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self._dataset.record(index)
        image = pad_to_square(Image.open(self._folder / record.images[0]).convert("RGB"), (127, 127, 127))
        pixels = self._processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        encoded = encode_conversation(record.turns, "qwen_2", self._tokenizer, num_images=1, max_length=4096)
        return torch.tensor(encoded.input_ids), pixels


def _collate_plain(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
    return ids, torch.stack([pixels for _, pixels in samples])


def plain_batches(dataset: PlainDataset, batch_size: int, num_workers: int) -> Iterator[int]:
    """Endless: images in each next batch of the plain loader, without a pause between epochs.

    Its workers come from a clean server process: forked beside DALI's threads they may crash.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "megatron_ross.data.dataset"])
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        sampler=torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=2**30),
        num_workers=num_workers,
        multiprocessing_context=context,
        collate_fn=_collate_plain,
    )
    for _, pixels in loader:
        yield len(pixels)


def engine_batches(
    dataset: RossDataset, batch_size: int, num_workers: int, decoder: PixelDecoder | None
) -> Iterator[int]:
    """Endless: images in each next step of our loader."""
    order = SampleOrder(len(dataset), seed=0)
    loader = RossLoader(
        dataset,
        order,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        num_workers=num_workers,
        decoder=decoder,
    )
    try:
        while True:
            yield sum(len(batch.pixels) for batch in loader.next_step() if batch.pixels is not None)
    finally:
        loader.close()


def images_per_second(make: Callable[[], Iterator[int]], num_images: int) -> float:
    """Rate over `num_images` after `NUM_WARMUP` batches: neither starting workers nor what they did ahead counts."""
    batches = make()
    for _ in range(NUM_WARMUP):
        next(batches)
    begin, done = time.perf_counter(), 0
    while done < num_images:
        done += next(batches)
    rate = done / (time.perf_counter() - begin)
    batches.close()  # type: ignore[attr-defined]
    return rate


@dataclass(frozen=True)
class Candidate:
    """A way to load: `batches` through its loader, and `work`, the same for some samples in this process alone."""

    batches: Callable[[], Iterator[int]]
    work: Callable[[range], object]


def cpu_ms_per_image(candidate: Candidate, num_images: int) -> float:
    """CPU time of all threads; unlike images per second it hardly depends on what else the machine does."""
    candidate.work(range(8))
    begin = time.process_time()
    candidate.work(range(num_images))
    return 1000 * (time.process_time() - begin) / num_images


def candidates(
    dataset: RossDataset, plain: PlainDataset, batch_size: int, num_workers: int, device: int | None
) -> dict[str, Candidate]:
    """The loaders to compare, by name."""

    def decode(decoder: PixelDecoder, indices: range) -> None:
        for i in range(0, len(indices), batch_size):
            decoder.decode([dataset[j].images[0] for j in indices[i : i + batch_size]])

    result = {
        "plain PyTorch DataLoader": Candidate(
            lambda: plain_batches(plain, batch_size, num_workers), lambda indices: [plain[i] for i in indices]
        ),
        "engine, pillow": Candidate(
            lambda: engine_batches(dataset, batch_size, num_workers, None),
            lambda indices: decode(PillowDecoder(num_workers), indices),
        ),
    }
    dali_version = _dali_version()
    if dali_version is None:
        return result
    from megatron_ross.data.dali_images import DaliDecoder

    for kind, device_id in (("cpu", None), ("mixed", device)):
        if kind == "cpu" or device is not None:
            make = functools.partial(DaliDecoder, dataset.image_processor, num_threads=num_workers, device_id=device_id)
            result[f"engine, dali {dali_version} {kind}"] = Candidate(
                lambda make=make: engine_batches(dataset, batch_size, num_workers, make()),
                functools.partial(decode, make()),
            )
    return result


def main(
    num_images: int = 512,
    image_size: int = 384,
    batch_size: int = 32,
    num_workers: int = 2,
    rounds: int = 5,
    device: int | None = None,
    json: Path | None = None,
) -> None:
    """Measure and print.

    Args:
        num_images: files, and images per round and path.
        device: GPU for DALI's mixed decoding; by default the first one if there is any.
        json: also write the figures there.
    """
    if device is None and torch.cuda.is_available():
        device = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, num_images)
        tokenizer = TextTokenizer(byte_tokenizer())
        processor = ImageProcessor(HALF, HALF, image_size)
        tokens = (image_size // 14) ** 2
        dataset = RossDataset(folder / "data.json", folder, tokenizer, "qwen_2", processor, tokens, 4096)
        plain = PlainDataset(dataset, tokenizer, folder, image_size)
        rivals = candidates(dataset, plain, batch_size, num_workers, device)
        rates: dict[str, list[float]] = {name: [] for name in rivals}
        cpu_ms: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(rounds):
            for name, rival in rivals.items():
                rates[name].append(images_per_second(rival.batches, num_images))
                cpu_ms[name].append(cpu_ms_per_image(rival, num_images))
    report(rates, cpu_ms, {"num_images": num_images, "image_size": image_size, "batch_size": batch_size,
                   "num_workers": num_workers, "rounds": rounds}, json)  # fmt: skip


def report(
    rates: dict[str, list[float]], cpu_ms: dict[str, list[float]], settings: dict[str, Any], json_file: Path | None
) -> None:
    """Print a table; one image per sample, so images/s are samples/s, too."""
    baseline = max(rates["plain PyTorch DataLoader"])
    print(f"{'path':28} {'images/s':>9} {'median':>8} {'x plain':>8} {'CPU ms/image':>13}")
    for name, values in rates.items():
        ratio, cpu = max(values) / baseline, min(cpu_ms[name])
        print(f"{name:28} {max(values):9.1f} {statistics.median(values):8.1f} {ratio:8.2f} {cpu:13.2f}")
    if json_file is not None:
        about = environment()
        about["versions"] |= {"pillow": PIL.__version__, "dali": _dali_version()}
        figures = {"settings": settings, "images_per_second": rates, "cpu_ms_per_image": cpu_ms}
        json_file.write_text(dumps(about | figures, indent=1) + "\n")


def _dali_version() -> str | None:
    try:
        import nvidia.dali
    except ImportError:
        return None
    return nvidia.dali.__version__


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)

"""Training from cached VAE moments equals training with the VAE, up to what float16 moments round off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ross.checkpoint.manifest import resolve_checkpoint
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.checkpoint.vae import load_latent_encoder
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.latent_cache import LatentCache, image_digest
from megatron_ross.training.data import build_dataset
from megatron_ross.training.latents import CachingOptions, cache_data_set, check_latent_cache
from megatron_ross.training.start import start_of
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.sources import ROOT
from tests.helpers.toy_run import curve, train, with_trainer, write_data
from tests.helpers.variants import Stored, make_variant, without_denoiser

STEPS = 3
NUM_SAMPLES, PER_SHARD = 29, 10
OPTIONS = CachingOptions(num_workers=2, samples_per_shard=PER_SHARD, show_progress=False)
RECON = 2e-5
"""float16 rounds each moment by up to 2^-11; in a mean over thousands of elements most of it cancels."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"layout": "VEt*4NDH"}),
    "tp2 pp2, no pixels beside the VAE's place": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "layout": "V|Et*4NDH"},
    ),
    "pp2 dp2": (4, {"pipeline_model_parallel_size": 2, "layout": "VEt*2|t*2NDH"}),
    "packed": (1, {"layout": "VEt*4NDH", "packing": True}),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")


@pytest.fixture(scope="module")
def settings(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A data set with a broken image."""
    data = write_data(tmp_path_factory.mktemp("data"), NUM_SAMPLES)
    (Path(data["image_folder"]) / "3_0.png").write_bytes(b"no image")
    return {
        **data,
        "init_from": str(stored.path),
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "lr": 2e-4,
        "lr_warmup_fraction": 0.0,
        "train_iters": STEPS,
        "seed": 5,
        "max_bad_sample_share": 1.0,
        "tensorboard": False,
    }


@pytest.fixture(scope="module")
def cache(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    report = cache_data_set(RunConfig.from_flat(settings), folder, OPTIONS)
    assert report.broken == 1
    assert report.incomplete == []  # max_bad_sample_share lets training skip it
    assert "3_0.png" in report.examples[0]
    assert report.encoded == len(LatentCache(folder))
    return folder


def test_a_cache_holds_the_posterior_of_every_image(settings: dict[str, Any], stored: Stored, cache: Path) -> None:
    run, checkpoint = RunConfig.from_flat(settings), open_checkpoint(stored.path)
    dataset = build_dataset(run, stored.model.vision, checkpoint.assets)
    encoder, found = load_latent_encoder(checkpoint), LatentCache(cache)
    num_images = 0
    for index in range(len(dataset)):
        for span in dataset[index].images:
            digest = image_digest(span.read_bytes())
            assert digest in found
            if "'3_0.png'" not in span.name:
                expected = torch.cat(encoder.posterior(span.load_pixels()[None]))
                torch.testing.assert_close(found.moments(digest, "").float(), expected, rtol=2**-10, atol=1e-5)
                num_images += 1
    assert len(found) == num_images + 1  # and the dummy image of text-only samples


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["token_mean", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_encoding_online(layout: str, mode: str, settings: dict[str, Any], cache: Path) -> None:
    """Also of text-only samples' dummy images, and with a broken image, which both skip."""
    world_size, flat = LAYOUTS[layout]
    flat = settings | flat | {"loss_mode": mode}
    online = run_ranks(curve, world_size, flat, STEPS)[0]
    cached = run_ranks(curve, world_size, flat | {"latent_cache": str(cache)}, STEPS)[0]
    assert online["digest"] == cached["digest"]
    assert cached["losses"][0][0] == pytest.approx(online["losses"][0][0], rel=1e-6)
    assert cached["losses"] != online["losses"]
    for ours, expected in zip(cached["losses"], online["losses"], strict=True):
        assert ours[:2] == pytest.approx(expected[:2], rel=RECON)


def run_and_look(rank: int, world_size: int, flat: dict[str, Any]) -> dict[str, Any]:
    """A run of some steps; which of this rank's parameters are a VAE's, and what its batches hold."""

    def act(trainer: Trainer) -> dict[str, Any]:
        names = [name for stage in trainer.stages for name, _ in stage.named_parameters()]
        batch = trainer.loader.next_step()[0]
        trainer.save()
        return {
            "vae": [name for name in names if "latent_encoder" in name],
            "letters": "".join(letter for stage in trainer.stages for letter in stage.spec.letters),
            "pixels": batch.pixels is not None,
            "latents": batch.latents is not None,
        }

    return with_trainer(flat, act)


@pytest.mark.distributed
def test_no_rank_holds_the_vae_and_checkpoints_are_whole(
    settings: dict[str, Any], cache: Path, stored: Stored, tmp_path: Path
) -> None:
    world_size, flat = LAYOUTS["tp2 pp2, no pixels beside the VAE's place"]
    flat = settings | flat | {"latent_cache": str(cache), "save": str(tmp_path)}
    for result in run_ranks(run_and_look, world_size, flat):
        assert not result["vae"]
        assert result["pixels"] == ("V" in result["letters"])
        assert result["latents"] == ("D" in result["letters"])
    saved, first = open_checkpoint(resolve_checkpoint(tmp_path / "checkpoints")), open_checkpoint(stored.path)
    assert saved.manifest.base is None
    assert saved.keys() == first.keys()
    for key in first.keys():  # noqa: SIM118
        if key.startswith("vae."):
            assert torch.equal(saved.read(key).float(), first.read(key).float())
    resumed = run_ranks(curve, 1, settings | LAYOUTS["one process"][1] | {"load": str(tmp_path), "init_from": ""}, 1)[0]
    assert resumed["iteration"] == 1


@pytest.mark.distributed
def test_a_run_outlives_the_checkpoint_that_it_resumed_from(
    settings: dict[str, Any], cache: Path, stored: Stored, tmp_path: Path
) -> None:
    """Retention removes it; the tokenizer, and the VAE that no rank holds, are taken from newer ones."""
    flat = settings | LAYOUTS["one process"][1] | {"save": str(tmp_path), "load": str(tmp_path)}
    flat |= {"latent_cache": str(cache), "save_interval": 1, "save_retain_last": 1, "lr_continue": "constant"}
    for train_iters in (1, 4):
        assert run_ranks(train, 1, flat | {"train_iters": train_iters}) == [""]
    (kept,) = (tmp_path / "checkpoints").glob("iter_*")
    assert kept.name == "iter_0000004"
    saved, first = open_checkpoint(kept), open_checkpoint(stored.path)
    assert saved.keys() == first.keys()
    assert {path.name for path in (kept / "assets").iterdir()} >= {"tokenizer_config.json"}


def test_caching_goes_on_where_it_stopped(settings: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    run = RunConfig.from_flat(settings)
    files = sorted(cache.glob("*.safetensors"))
    assert len(files) == -(-NUM_SAMPLES // PER_SHARD)
    kept, lost = files[:-1], files[-1]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    lost.unlink()
    (cache / ".unfinished.safetensors.1.tmp").write_bytes(b"half")
    report = cache_data_set(run, cache, OPTIONS)
    assert (report.kept_blocks, report.repaired_blocks, report.broken) == (len(kept), 1, 1)
    assert all(path.stat().st_mtime_ns == before[path][0] for path in kept)
    assert lost.read_bytes() == before[lost][1]


@pytest.mark.distributed
def test_an_image_that_is_not_cached_is_named(settings: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    records = json.loads(Path(settings["data_path"]).read_text())
    text_only, with_image = records[1], records[0]
    data = write_data(tmp_path / "other", 1)
    name = "unknown.png"
    (Path(settings["image_folder"]) / name).write_bytes((Path(data["image_folder"]) / "0_0.png").read_bytes() + b"x")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([text_only] * 3 + [with_image | {"image": name}]))
    flat = settings | LAYOUTS["one process"][1] | {"data_path": str(path), "latent_cache": str(cache)}
    with pytest.raises(RuntimeError, match=r"image 'unknown.png' is not in latent_cache .*cache_latents.py"):
        run_ranks(curve, 1, flat, 1)


def another_vae(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    name = next(n for n in tensors if "pixel_decoder" in n and ".encoder." in n)
    tensors[name] = tensors[name] * 1.01


@pytest.mark.parametrize(
    ("base", "edits", "message"),
    [
        ("qwen2_siglip", (another_vae,), "is for another VAE"),
        ("llama_clip", (), r"is for other images \(resize\)"),
        ("qwen2_siglip", (without_denoiser,), "has no VAE"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    base: str, edits: tuple, message: str, settings: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    other = make_variant(tmp_path, base, *edits)
    run = RunConfig.from_flat(settings | {"init_from": str(other.path), "latent_cache": str(cache)})
    with pytest.raises(ValueError, match=message) as caught:
        check_latent_cache(run, start_of(run).directory)
    assert "\n" not in str(caught.value)
    if "VAE" in message and other.model.vae is not None:
        with pytest.raises(ValueError, match=message):
            cache_data_set(run, cache, OPTIONS)


def test_training_refuses_before_it_starts(settings: dict[str, Any], tmp_path: Path) -> None:
    flat = settings | {"latent_cache": str(tmp_path)}
    arguments = [f"--{name}={value}" for name, value in flat.items()]
    command = [sys.executable, "pretrain_ross.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    # Where CUDA's compiler is installed and no GPU is, torch says so first.
    (line,) = [line for line in result.stderr.strip().splitlines() if "No CUDA runtime is found" not in line]
    assert line.startswith("error: latent_cache=")
    assert "tools/cache_latents.py" in line


def test_a_damaged_file_is_named(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_bytes((cache / "cache.json").read_bytes())
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"x.safetensors is damaged .* delete it"):
        LatentCache(tmp_path)

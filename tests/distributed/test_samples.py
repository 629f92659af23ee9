"""Pictures and answers while training: those of the exported model, in every layout, and training does not notice."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.evaluation.answers import Question, answer_questions
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.generate import load_for_inference, open_image
from megatron_ross.evaluation.options import Decoding
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.pictures import PANEL_GAP_PX, to_pil
from megatron_ross.parallel.param_gather import gather_now
from megatron_ross.parity.gather import gather_parameters
from megatron_ross.training.latents import CachingOptions, cache_data_set
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import RankError, run_ranks
from tests.helpers.tensorboard import tensorboard_events
from tests.helpers.toy_run import with_trainer, write_data
from tests.helpers.variants import Stored, make_variant, without_denoiser

NUM_PICTURES, NUM_ANSWERS, NEW_TOKENS, STEPS = 3, 4, 6, "6"
ONE = {"layout": "VEt*4NDH"}
TP2PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "layout": "V|Et*4NDH"}
PP4 = {"pipeline_model_parallel_size": 4, "layout": "VE|t*2|t*2ND|H"}
VPP2 = {"pipeline_model_parallel_size": 2, "layout": "VEt|t|t|tNDH"}
SP_OVERLAP = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "layout": "VEt*4NDH"} | {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 1,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")


@pytest.fixture(scope="module")
def settings(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = write_data(tmp_path_factory.mktemp("data"), 16)
    valid = write_data(tmp_path_factory.mktemp("valid"), 12)
    (Path(valid["image_folder"]) / "3_0.png").write_bytes(b"no image")
    return {
        **data,
        "valid_data_path": valid["data_path"],
        "valid_image_folder": valid["image_folder"],
        "init_from": str(stored.path),
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "lr": 2e-3,
        "lr_warmup_fraction": 0.0,
        "train_iters": 2,
        "log_interval": 1,
        "seed": 5,
        "tensorboard": False,
    }


WATCH = {
    "sample_interval": 1,
    "num_pictures": NUM_PICTURES,
    "picture_steps": STEPS,
    "num_answers": NUM_ANSWERS,
    "answer_max_new_tokens": NEW_TOKENS,
}


STILL = WATCH | {"lr": 0.0, "train_iters": 1}
"""Weights stay as they are: packs train on other samples."""


def trained(rank: int, world_size: int, flat: dict[str, Any]) -> dict[str, Any]:
    """A whole run; losses and weights."""

    def act(trainer: Trainer) -> dict[str, Any]:
        losses, step = [], trainer._step

        def recorded() -> Any:
            result, work = step()
            losses.append((result.lm_loss, result.recon_loss, result.grad_norm))
            return result, work

        trainer._step = recorded  # type: ignore[method-assign]
        trainer.train()
        gather_now(trainer.chunks)
        return {
            "losses": losses,
            "parameters": gather_parameters(trainer.stages, trainer.manifest.model, trainable_only=True),
        }

    return with_trainer(flat, act)


def answers(folder: Path, iteration: int = 2) -> list[dict[str, Any]]:
    return json.loads((folder / "samples" / f"iteration-{iteration:07d}.json").read_text())["answers"]


def panels(folder: Path, iteration: int = 2) -> np.ndarray:
    """uint8 [rows, 3, side, side, 3] of a grid."""
    grid = np.asarray(Image.open(folder / "samples" / f"iteration-{iteration:07d}.png"))
    side = (grid.shape[1] + PANEL_GAP_PX) // 3 - PANEL_GAP_PX
    pitch = side + PANEL_GAP_PX
    rows = (grid.shape[0] + PANEL_GAP_PX) // pitch
    return np.stack(
        [
            np.stack([grid[r * pitch : r * pitch + side, c * pitch : c * pitch + side] for c in range(3)])
            for r in range(rows)
        ]
    )


Run = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """TP2 x PP2."""
    folder = tmp_path_factory.mktemp("run")
    flat = settings | TP2PP2 | WATCH | {"save": str(folder), "tensorboard": True}
    return folder, run_ranks(trained, 4, flat, timeout_s=240)[0]


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(trained, 1, settings | ONE | STILL | {"save": str(folder)})
    return folder


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_checkpoint(run[0] / "checkpoints", folder, "ross")
    return folder


@pytest.mark.distributed
def test_answers_are_those_of_the_exported_model(run: Run, exported: Path, settings: dict[str, Any]) -> None:
    chat = ChatModel(*load_for_inference(str(exported), device="cpu", template="qwen_2"))
    found = answers(run[0])
    assert len(found) == NUM_ANSWERS
    for entry in found:
        images = [open_image(Path(settings["valid_image_folder"]) / name) for name in entry["images"]]
        assert images
        assert "3_0.png" not in entry["images"]  # broken
        text = entry["question"].replace("<image>", "").strip()
        if len(images) == 1:
            question = Question(text, images[0])
            assert list(answer_questions(chat, [question], Decoding(NEW_TOKENS), 1)) == [entry["answer"]]
    assert sum(len(entry["images"]) == 1 for entry in found) >= 2
    records = json.loads(Path(settings["valid_data_path"]).read_text())
    assert [e["expected"] for e in found] == [records[e["sample_id"]]["conversations"][1]["value"] for e in found]


@pytest.mark.distributed
def test_pictures_are_those_of_the_exported_model(run: Run, exported: Path, settings: dict[str, Any]) -> None:
    """Left: what the tower saw. Middle: through the VAE. Right: painted, from the same noise as `reconstruct`."""
    model, processor = load_for_inference(str(exported), device="cpu", template="qwen_2")
    rows = panels(run[0])
    assert len(rows) == NUM_PICTURES
    encoder = model.latent_encoder
    for i, (row, entry) in enumerate(zip(rows, answers(run[0]), strict=False)):
        image = open_image(Path(settings["valid_image_folder"]) / entry["images"][0])
        pixels = processor.pixels([image])
        assert np.array_equal(row[0], np.asarray(to_pil(encoder.vae_input(pixels))[0]))
        assert close(row[1], np.asarray(to_pil(encoder.round_trip(pixels))[0]))
        if len(entry["images"]) == 1:
            (painted,) = model.reconstruct([image], steps=STEPS, seed=i, processor=processor)
            assert close(row[2], np.asarray(painted))
            assert not close(row[2], row[1])


@pytest.mark.distributed
def test_tensorboard_shows_what_the_run_folder_holds(run: Run) -> None:
    events = tensorboard_events(run[0])
    assert {"train/lm_loss", "train/recon_loss", "train/grad_norm"} <= set(events.Tags()["scalars"])
    metrics = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    logged = [(event.step, event.value) for event in events.Scalars("train/recon_loss")]
    assert logged == [(line["iteration"], pytest.approx(line["recon_loss"])) for line in metrics]
    texts, images = events.Tensors("samples/answers/text_summary"), events.Images("samples/pictures")
    assert [event.step for event in texts] == [event.step for event in images] == [1, 2]
    for iteration, text, image in zip((1, 2), texts, images, strict=True):
        (table,) = text.tensor_proto.string_val
        rows = table.decode().splitlines()
        assert rows[0].split(" | ")[0] == "| sample_id"
        for row, entry in zip(rows[2:], answers(run[0], iteration), strict=True):
            cells = row.removeprefix("| ").removesuffix(" |").split(" | ")
            assert (cells[0], cells[3]) == (str(entry["sample_id"]), entry["expected"])
        shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert np.array_equal(shown, np.asarray(Image.open(run[0] / f"samples/iteration-{iteration:07d}.png")))


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal but for rounding to 8 bits."""
    return bool(np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1)


@pytest.mark.distributed
def test_training_does_not_notice(run: Run, settings: dict[str, Any]) -> None:
    _, got = run
    expected = run_ranks(trained, 4, settings | TP2PP2)[0]
    assert got["losses"] == expected["losses"]
    assert all(torch.equal(got["parameters"][name], t) for name, t in expected["parameters"].items())


def painted_late(rank: int, world_size: int, flat: dict[str, Any]) -> list[bool]:
    """Whether the second step had ended, for every picture: none is decoded before, or in vain after half a minute."""
    second_step, went_on, decode = threading.Event(), [], LatentEncoder.decode_latents

    def late(encoder: LatentEncoder, z: torch.Tensor) -> torch.Tensor:
        went_on.append(second_step.wait(30))
        return decode(encoder, z)

    def act(trainer: Trainer) -> list[bool]:
        step = trainer._step

        def watched() -> Any:
            result = step()
            if trainer.iteration == 2:
                second_step.set()
            return result

        trainer._step = watched  # type: ignore[method-assign]
        with mock.patch.object(LatentEncoder, "decode_latents", late):
            trainer.train()
        return went_on

    return with_trainer(flat, act)


@pytest.mark.distributed
def test_no_rank_waits_for_a_slow_painter(settings: dict[str, Any], run: Run, tmp_path: Path) -> None:
    (went_on,) = run_ranks(painted_late, 1, settings | ONE | WATCH | {"save": str(tmp_path), "tensorboard": True})
    assert went_on == [True] * (2 * 2 * NUM_PICTURES)  # two iterations; a picture's round trip is decoded, too
    assert close(panels(tmp_path, 1), panels(run[0], 1))
    events = tensorboard_events(tmp_path).Images("samples/pictures")
    assert [event.step for event in events] == [1, 2]


def painted_badly(rank: int, world_size: int, flat: dict[str, Any]) -> None:
    with mock.patch.object(LatentEncoder, "decode_latents", side_effect=ArithmeticError("no picture")):
        with_trainer(flat, Trainer.train)


@pytest.mark.distributed
def test_a_painter_that_fails_ends_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RankError, match="no picture"):
        run_ranks(painted_badly, 1, settings | ONE | STILL | {"save": str(tmp_path)})


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "flat"),
    [
        pytest.param(1, ONE | {"packing": True, "global_batch_size": 2}, id="one process, packed"),
        pytest.param(4, PP4, id="pp4, pictures are sent"),
        pytest.param(2, VPP2, id="pp2 vpp2", marks=pytest.mark.slow),
        pytest.param(4, SP_OVERLAP, id="tp2 dp2, sequence parallel, overlapped", marks=pytest.mark.slow),
    ],
)
def test_every_layout_gives_the_same(
    ranks: int, flat: dict[str, Any], alone: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    run_ranks(trained, ranks, settings | STILL | flat | {"save": str(tmp_path)}, timeout_s=240)
    assert answers(tmp_path, 1) == answers(alone, 1)
    assert close(panels(tmp_path, 1), panels(alone, 1))


@pytest.mark.distributed
def test_cached_latents(alone: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """The cache covers held-out samples, too; no rank has the VAE, so the one that paints loads it."""
    cache = tmp_path / "cache"
    cache_data_set(RunConfig.from_flat(settings), cache, CachingOptions(num_workers=1, show_progress=False))
    folder = tmp_path / "run"
    folder.mkdir()
    flat = settings | STILL | {"latent_cache": str(cache), "save": str(folder), "eval_interval": 1}
    run_ranks(trained, 2, flat | {"pipeline_model_parallel_size": 2, "layout": "VEt*2|t*2NDH"})
    assert answers(folder, 1) == answers(alone, 1)
    assert close(panels(folder, 1), panels(alone, 1))
    (validation,) = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert validation["num_images"] > 0
    assert validation["recon_loss"] > 0.5


@pytest.mark.distributed
def test_a_model_without_denoiser_answers(settings: dict[str, Any], tmp_path: Path) -> None:
    stored = make_variant(tmp_path / "llava", "qwen2_siglip", without_denoiser)
    flat = settings | {"init_from": str(stored.path), "pipeline_model_parallel_size": 2, "layout": "VEt*2|t*2NH"}
    (tmp_path / "run").mkdir()
    run_ranks(trained, 2, flat | WATCH | {"save": str(tmp_path / "run"), "tensorboard": True})
    assert len(answers(tmp_path / "run")) == NUM_ANSWERS
    assert not list((tmp_path / "run" / "samples").glob("*.png"))


@pytest.mark.distributed
@pytest.mark.parametrize(("off", "suffix"), [("num_answers", ".png"), ("num_pictures", ".json")])
def test_each_can_be_turned_off(off: str, suffix: str, settings: dict[str, Any], tmp_path: Path) -> None:
    flat = settings | ONE | WATCH | {off: 0, "train_iters": 1, "save": str(tmp_path), "tensorboard": True}
    run_ranks(trained, 1, flat)
    assert [path.suffix for path in (tmp_path / "samples").iterdir()] == [suffix]

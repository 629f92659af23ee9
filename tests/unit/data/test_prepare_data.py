"""tools/prepare_data.py: what it says of a run's data, by source, is what training then does; shards hold the rest."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, resolve_checkpoint
from megatron_ross.config.cli import parse_run_config
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.quarantine import BadSamplePolicy, TooManyBadSamplesError
from megatron_ross.data.rgb import KINDS
from megatron_ross.data.survey import SKIPPED
from megatron_ross.planner.workload import Work
from megatron_ross.training.data import bad_sample_limits, build_dataset, build_order
from megatron_ross.training.empty_steps import EmptySteps
from megatron_ross.training.errors import TrainingError
from megatron_ross.training.schedule import num_iterations
from tests.helpers.variants import make_variant

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "tools/prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip").path


@pytest.fixture
def blend(toy) -> list[dict[str, Any]]:
    """Two files with one of every fault; the second source comes half as often as the first."""
    records = json.loads((toy / "data.json").read_text())
    human = {"from": "human", "value": "Well?"}
    records[0] = {"id": "r", "conversations": 3}
    records[1] = {"id": "c", "image": "1.png", "conversations": [human, {"from": "gpt", "value": "x"}]}
    records[3] = {"id": "e", "conversations": [human, {"from": "gpt", "value": " "}]}
    records[4]["image"] = "TWO.TIFF"
    records[8] = {"id": "m", "conversations": [human, {"from": "gpt", "value": "USER: a ASSISTANT: b"}]}
    question = {"from": "human", "value": "<image>\n" * 5 + "Which?"}
    records[9] = {"id": "l", "image": ["1.png"] * 5, "conversations": [question, {"from": "gpt", "value": "x"}]}
    records[10]["image"] = "../data.json"
    Image.open(toy / "images/4.png").save(toy / "images/TWO.TIFF")
    (toy / "images/5.png").write_bytes((toy / "images/5.png").read_bytes()[:200])
    for name, part in (("a", records[:9]), ("b", records[9:])):
        (toy / f"{name}.json").write_text(json.dumps(part))
    folder = str(toy / "images")
    return [
        {"data_path": str(toy / "a.json"), "image_folder": folder, "epochs": 2},
        {"data_path": str(toy / "b.json"), "image_folder": folder, "epochs": 1},
    ]


@pytest.fixture
def config(blend, checkpoint, tmp_path) -> Path:
    settings = {"blend": blend, "init_from": str(checkpoint), "seq_length": 100, "packing": True,
                "global_batch_size": 3, "num_workers": 1, "num_epochs": 2, "seed": 5}  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _consumed(config: Path, num_sequences: int) -> RossLoader:
    """A closed loader that trained on so many sequences."""
    run = parse_run_config(["--config", str(config)])
    assets = resolve_checkpoint(Path(run.training.init_from))
    dataset = build_dataset(run, Manifest.read(assets).model.vision, assets / ASSETS_NAME)
    order = build_order(run, dataset)
    policy = BadSamplePolicy(max_bad_share=1, max_mismatch_share=1)
    loader = RossLoader(dataset, order, global_batch_size=1, micro_batch_size=1, source_ends=dataset.ends,
                        pack_length=run.data.seq_length, num_workers=1, bad_samples=policy)  # fmt: skip
    loader.supervised = sum(batch.num_supervised_tokens for _ in range(num_sequences) for batch in loader.next_step())
    loader.close()
    assert loader.consumed_sequences == order.epoch_length(0)
    loader.train_steps = num_iterations(run, order)
    return loader


def test_a_blend_is_reported_as_training_takes_it(tool, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--config", str(config), "--out", str(tmp_path / "out")]
    assert tool.main(arguments) == 1
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    plan, per_epoch = report["epoch"]["packed"], report["per_epoch"]
    training = _consumed(config, plan["sequences"])
    assert training.consumed_samples == plan["samples"] == 2 * 9 + 14
    assert training.consumed_by_source == [18, 14]
    assert training.supervised == plan["supervised_tokens"] > 0
    assert training.train_steps == report["train_steps"]
    assert training.bad_sample_counts == {
        "bad": sum(per_epoch.get(kind, 0) for kind in SKIPPED),
        "mismatch": per_epoch["mismatch"],
        "images_cut": per_epoch["images_cut"],
    }
    first, second = report["sources"].values()
    assert list(report["sources"]) == ["0_a", "1_b"]
    assert first["found"]["bad_record"] == first["found"]["bad_conversation"] == first["found"]["empty_answer"] == 1
    assert per_epoch["bad_record"] == 2, "its source comes twice"
    assert "outside the image root" in " ".join(second["examples"]["bad_image"])
    assert Counter(report["samples"]) == Counter(first["found"]) + Counter(second["found"])
    for text in ("tokens per sample", "images per sample", "#####", "source 1_b: 14 samples", "(skipped in training)"):
        assert text in printed
    assert Image.open(tmp_path / "out/histograms.png").size[0] > 500


@pytest.mark.parametrize("conversion", [None, "published"])
def test_pictures_that_a_setting_decides_about_are_counted(conversion, tool, toy, checkpoint, tmp_path, capsys):
    """Where training sees them; two in one sample are one finding."""
    images = toy / "images"
    deep = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(deep).save(images / "deep.png")
    Image.fromarray(deep.astype(np.float32)).save(images / "float.tif")
    Image.new("LA", (40, 30), (0, 9)).save(images / "ink.png")
    Image.new("RGB", (40, 30)).save(images / "turned.jpg", exif=exif)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    names = ["deep.png", "float.tif", "ink.png", "turned.jpg", "1.png"]
    records = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names * 2)]
    two = [{"from": "human", "value": "<image>\n<image>\nWhat?"}, turns[1]]
    records.append({"id": "two", "image": ["deep.png", "deep.png"], "conversations": two})
    records.append({"id": "cut", "image": ["1.png"] * 6 + ["ink.png"], "conversations": [
        {"from": "human", "value": "<image>\n" * 7}, turns[1]]})  # fmt: skip
    (toy / "kinds.json").write_text(json.dumps(records))
    arguments = [f"--data-path={toy / 'kinds.json'}", f"--image-folder={images}", f"--init-from={checkpoint}"]
    arguments += ["--seq-length=100", f"--out={tmp_path / 'out'}", "--global-batch-size=2"]
    assert tool.main(arguments + ([f"--image-conversion={conversion}"] if conversion else [])) == 0
    printed = capsys.readouterr().out
    (found,) = (s["found"] for s in json.loads((tmp_path / "out/report.json").read_text())["sources"].values())
    assert {k: n for k, n in found.items() if k in KINDS} == {
        "image_16_bit": 3, "image_float": 2, "image_transparent": 2, "image_rotated": 2
    }  # fmt: skip
    shown = (
        "image_16_bit: 3 samples (image_conversion viewer: 16-bit grey, scaled to 8 bits; published: 16-bit grey, cl"
    )
    clipped = (
        "image_16_bit: 3 samples (image_conversion published: 16-bit grey, clipped at 255; viewer: 16-bit grey, sc"
    )
    assert (shown in printed, clipped in printed) == (conversion is None, conversion is not None)
    assert "image 'turned.jpg' is " + ("EXIF orientation ignored" if conversion else "turned as EXIF says") in printed


def test_shards_of_a_blend_hold_what_training_can_use(tool, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = tmp_path / "shards"
    arguments = ["--config", str(config), "--out", str(tmp_path / "out")]
    shard_arguments = [*arguments, "--write-shards", str(shards), "--samples-per-shard", "4"]
    tool.main(shard_arguments)
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed[printed.index("blend:") :])
    skipped = set(json.loads((tmp_path / "out/report.json").read_text())["skipped"])
    run = parse_run_config(["--config", str(config)])
    assets = resolve_checkpoint(Path(run.training.init_from))
    vision = Manifest.read(assets).model.vision
    flags = ["--config", str(config), "--blend", json.dumps(settings["blend"])]
    local, packed = (build_dataset(r, vision, assets / ASSETS_NAME) for r in (run, parse_run_config(flags)))
    kept = [i for i in range(23) if i not in skipped]
    assert len(packed) == len(kept)
    for number, index in enumerate(kept):
        assert torch.equal(packed[number].input_ids, local[index].input_ids)
        for a, b in zip(packed[number].images, local[index].images, strict=True):
            assert torch.equal(a.load_pixels(), b.load_pixels())
    removed = sorted(shards.glob("*/*.tar"))[1]
    content = removed.read_bytes()
    removed.unlink()
    tool.main(shard_arguments)
    assert removed.read_bytes() == content
    capsys.readouterr()
    assert tool.main([*shard_arguments[:-1], "5"]) == 1
    assert "holds shards of other samples" in capsys.readouterr().err


def _run_of(toy: Path, checkpoint: Path, tmp_path: Path, records: list[Any], **settings: Any) -> list[str]:
    """Flags of a run on these records."""
    (toy / "own.json").write_text(json.dumps(records))
    flat = {"data_path": str(toy / "own.json"), "image_folder": str(toy / "images"), "init_from": str(checkpoint),
            "seq_length": 512, "global_batch_size": 4, "num_workers": 1, "seed": 5, **settings}  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(flat))
    return ["--config", str(tmp_path / "own.yaml")]


def _training_stop(flags: list[str]) -> tuple[int, str] | None:
    """Step and message with which the data stops a run; None if it does not. A loader and its guards, without model."""
    run = parse_run_config(flags)
    assets = resolve_checkpoint(Path(run.training.init_from))
    dataset = build_dataset(run, Manifest.read(assets).model.vision, assets / ASSETS_NAME)
    order = build_order(run, dataset)
    loader = RossLoader(dataset, order, global_batch_size=run.data.global_batch_size, micro_batch_size=1,
                        num_workers=1, bad_samples=bad_sample_limits(run, order))  # fmt: skip
    steps = num_iterations(run, order)
    empty = EmptySteps(run, -(-order.epoch_length(0) // run.data.global_batch_size), steps)
    try:
        for step in range(1, steps + 1):
            try:
                batches = loader.next_step()
                tokens = sum(batch.num_supervised_tokens for batch in batches)
                images = sum(int((batch.recon_weight > 0).sum()) for batch in batches)
                has_gradient = images > 0 or not run.trainability.freeze_language_model
                empty.look(step, Work(0, 0, tokens, images, images), float(has_gradient))
            except (TooManyBadSamplesError, TrainingError) as error:
                return step, str(error)
        return None
    finally:
        loader.close()


BAD = {"id": "b", "conversations": 3}
QUESTION, ANSWER = {"from": "human", "value": "Well?"}, {"from": "gpt", "value": "A cup."}
TEXT = {"id": "t", "conversations": [QUESTION, ANSWER]}
MASKED = {"id": "m", "conversations": [QUESTION, ANSWER | {"value": ""}]}
PICTURE = {"id": "p", "image": "1.png", "conversations": [QUESTION | {"value": "<image>\nWell?"}, ANSWER]}
BROKEN = PICTURE | {"image": "gone.png"}
FROZEN = {"freeze_language_model": True}

STOPS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "8 of 8 bad": ([BAD] * 8, {}, "max_bad_sample_share=0.01"),
    "1 of 8 bad": ([BAD, *[TEXT] * 7], {}, "max_bad_sample_share=0.01"),
    "1 of 10 broken images": ([BROKEN, *[PICTURE] * 9], {}, "max_bad_sample_share=0.01"),
    "1 of 10 masked": ([MASKED, *[TEXT] * 9], {}, "max_mismatch_share=0.01"),
    "1 of 99 bad": ([BAD, *[TEXT] * 98], {}, "max_bad_sample_share=0.01"),
    "2 of 100 bad": ([BAD, BAD, *[TEXT] * 98], {}, "max_bad_sample_share=0.01"),
    "11 of 1000 bad": ([*[BAD] * 11, *[TEXT] * 989], {"global_batch_size": 100}, "max_bad_sample_share=0.01"),
    "text alone in stage 1": ([TEXT] * 10, FROZEN, "gradient norm of exactly 0"),
    "an epoch of masked answers": ([MASKED] * 10, {"max_mismatch_share": 1.0}, "no supervised token"),
    "text alone without a language loss": ([TEXT] * 10, {"lm_loss_weight": 0}, "no image to reconstruct"),
    "broken pictures without a language loss": (
        [BROKEN] * 10,
        {"lm_loss_weight": 0, "max_bad_sample_share": 1.0},
        "no image to reconstruct",
    ),
    "a long run of text among pictures": (
        [PICTURE, *[TEXT] * 200],
        FROZEN | {"global_batch_size": 1, "max_empty_steps": 50},
        "gradient norm of exactly 0",
    ),
}
GOES_ON: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "10 good": ([PICTURE] * 10, {}),
    "1 of 10 bad where that is allowed": ([BAD, *[TEXT] * 9], {"max_bad_sample_share": 0.1}),
    "1 of 100 bad": ([BAD, *[TEXT] * 99], {}),
    "10 of 1000 bad": ([*[BAD] * 10, *[TEXT] * 990], {"global_batch_size": 100}),
    "bad ones that the run does not reach": ([*[TEXT] * 300, *[BAD] * 3], {"train_iters": 1}),
    "text among pictures in stage 1": ([*[PICTURE] * 5, *[TEXT] * 5], FROZEN | {"global_batch_size": 1}),
    "pictures alone": ([{"image": "1.png"}] * 6, {"lm_loss_weight": 0}),
}


@pytest.mark.parametrize("case", STOPS)
def test_exit_1_where_training_stops(tool, case, toy, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records, settings, reason = STOPS[case]
    flags = _run_of(toy, checkpoint, tmp_path, records, **settings)
    step, message = _training_stop(flags)
    assert reason in message
    assert tool.main([*flags, "--out", str(tmp_path / "out")]) == 1
    (stop,) = json.loads((tmp_path / "out/report.json").read_text())["stops"]
    until_examples = message.partition(" Examples")[0]
    assert stop.startswith(f"training would stop at iteration {step}: {until_examples}")
    assert stop in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("case", GOES_ON)
def test_exit_0_where_training_goes_on(tool, case, toy, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records, settings = GOES_ON[case]
    flags = _run_of(toy, checkpoint, tmp_path, records, **settings)
    assert _training_stop(flags) is None
    assert tool.main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["stops"] == []


def test_validation_is_rehearsed(tool, toy, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = _run_of(toy, checkpoint, tmp_path, [PICTURE] * 8, eval_interval=2, valid_data_path=str(toy / "valid.json"))
    for number, (records, code, text) in enumerate([
        ([MASKED] * 3, 1, "validation would stop: its samples have no supervised token"),
        ([BAD] * 11, 1, "validation would stop at batch 3: 11 of 12 samples are bad"),
        ([*[BAD] * 3, TEXT], 0, "source validation: 4 samples"),
    ]):  # fmt: skip
        (toy / "valid.json").write_text(json.dumps(records))
        assert tool.main([*flags, "--out", str(tmp_path / f"out{number}")]) == code
        assert text in capsys.readouterr().out
    held_out = _run_of(toy, checkpoint, tmp_path, [PICTURE] * 8, eval_interval=2, valid_split=0.25)
    assert tool.main([*held_out, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "llama3"}, "template=llama3: the end token <|eot_id|> is no token"),
        ({"seq_length": 40}, "seq_length=40: has no room for an image"),
        ({"lm_loss_weight": 0, "recon_loss_weight": 0}, "nothing would be trained"),
        ({"max_bad_sample_share": 2}, "max_bad_sample_share=2"),
        ({"freeze_language_model": True, "freeze_mm_mlp_adapter": True, "freeze_mm_inv_projector": True}, "no part is"),
    ],
)
def test_what_is_refused_at_start_is_refused_here(tool, toy, checkpoint, tmp_path, capsys, settings, message):
    flags = _run_of(toy, checkpoint, tmp_path, [PICTURE] * 4, **settings)
    assert tool.main([*flags, "--out", str(tmp_path / "out")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert line.startswith("error: ")
    assert message in line


def test_without_a_checkpoint_model_and_tokenizer_are_named(tool, toy, golden, tmp_path, capsys):
    arguments = ["--data-path", str(toy / "data.json"), "--image-folder", str(toy / "images"), "--num-workers", "1",
                 "--seq-length", "2048", "--out", str(tmp_path / "out")]  # fmt: skip
    assert tool.main(arguments) == 1
    assert "give both --model and --tokenizer" in capsys.readouterr().err
    named = ["--model", "qwen2-7b+siglip-so400m", "--tokenizer", str(golden / "llm_qwen2")]
    assert tool.main([*arguments, *named, "--skip-images"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["epoch"]["padded"]["samples"] == 23
    assert report["epoch"]["padded"]["tokens"] > 729 * report["epoch"]["padded"]["images"]
    assert report["train_steps"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "gone.json"], "error: cannot read the data file gone.json"),
        (["--blend", "[{data_path: a.json}]"], "error: blend[0]: has neither weight nor epochs"),
        (["--samples-per-shard", "0"], "error: samples_per_shard=0: must be at least 1"),
        (["--data_root", "x"], "error: data_root: no such setting"),
        (["--model", "gpt-5"], "error: "),
    ],
)
def test_mistakes_are_one_line(tool, golden, tmp_path, capsys, flags, message):
    named = ["--model", "qwen2-7b+siglip-so400m", "--tokenizer", str(golden / "llm_qwen2")]
    assert tool.main(["--out", str(tmp_path), *named, *flags]) == 1
    assert capsys.readouterr().err.startswith(message)

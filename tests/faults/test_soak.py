"""A long run does not wear out: two thousand steps with saves, validations and bad samples, on two real ranks.

Memory, open files and threads of every rank must not grow, and no child may be left as a zombie.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ross.checkpoint.retention import complete_iterations
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.process_stats import ProcessStats, own_stats
from tests.helpers.toy_run import two_stage_settings, with_trainer

pytestmark = pytest.mark.faults

STEPS, SAMPLED_EVERY = 2000, 20
SAVE_INTERVAL, EVAL_INTERVAL = 50, 100
MAX_GROWTH = 0.02
LIMIT_S = 1800.0


def _spoil(settings: dict[str, Any]) -> None:
    """Break samples in all the ways that a data set has."""
    path, images = Path(settings["data_path"]), Path(settings["image_folder"])
    records = json.loads(path.read_text())
    with_image = [i for i, record in enumerate(records) if isinstance(record.get("image"), str)]
    cut, noise, missing, outside, no_turns, no_record = random.Random(1).sample(with_image, 6)
    (images / records[cut]["image"]).write_bytes((images / records[cut]["image"]).read_bytes()[:200])
    (images / records[noise]["image"]).write_bytes(b"no image at all")
    (images / records[missing]["image"]).unlink()
    records[outside]["image"] = "../data.json"
    records[no_turns]["conversations"] = []
    records[no_record] = ["not", "a", "record"]
    path.write_text(json.dumps(records))


def _soak(rank: int, world_size: int, flat: dict[str, Any]) -> list[dict[str, int]]:
    """The whole loop; what the system said of this rank on the way."""
    samples: list[dict[str, int]] = []

    def act(trainer: Trainer) -> None:
        step = trainer._step

        def sampled() -> Any:
            result = step()
            if trainer.iteration % SAMPLED_EVERY == 0:
                samples.append(asdict(own_stats()))
            return result

        trainer._step = sampled  # type: ignore[method-assign]
        trainer.train()

    with_trainer(flat, act)
    return samples


def growth(rss: list[int]) -> float:
    """What the straight line through the samples gains from end to end, as a share of their mean."""
    slope = np.polyfit(np.arange(len(rss)), rss, 1)[0]
    return float(slope * (len(rss) - 1) / np.mean(rss))


def test_two_thousand_steps_wear_nothing_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = two_stage_settings(tmp_path)
    _spoil(settings)
    flat = settings | {
        "save": str(tmp_path / "run"),
        "global_batch_size": 2,
        "train_iters": STEPS,
        "log_interval": 10,
        "save_interval": SAVE_INTERVAL,
        "save_retain_last": 2,
        "async_save": True,
        "valid_split": 0.1,
        "eval_interval": EVAL_INTERVAL,
        "max_bad_sample_share": 0.5,
    }
    for rank, samples in enumerate(run_ranks(_soak, 2, flat, timeout_s=LIMIT_S)):
        late = [ProcessStats(**sample) for sample in samples[len(samples) // 2 :]]
        rss, files, threads = ([getattr(s, name) for s in late] for name in ("rss", "files", "threads"))
        with capsys.disabled():
            print(
                f"\nrank {rank}: RSS {samples[0]['rss'] / 2**20:.1f} MiB at first, {rss[0] / 2**20:.1f} in the middle, "
                f"{rss[-1] / 2**20:.1f} at the end: {100 * growth(rss):+.2f} % over the second half; "
                f"{min(files)} to {max(files)} files, {min(threads)} to {max(threads)} threads"
            )
        (tmp_path / f"samples-{rank}.json").write_text(json.dumps(samples))
        assert growth(rss) < MAX_GROWTH
        assert max(files) == min(files)
        assert max(threads) == min(threads)
        assert not any(s["zombies"] for s in samples)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["iteration"] == STEPS
    assert all(math.isfinite(line[name]) for line in lines for name in ("lm_loss", "recon_loss") if name in line)
    assert lines[-1]["bad_samples"]["bad"] > 0
    validations = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    assert len(validations) == STEPS // EVAL_INTERVAL
    saves = sum(line["save_stall_seconds"] > 0 for line in lines)
    assert saves == STEPS // SAVE_INTERVAL
    with capsys.disabled():
        print(f"{saves} saves, {len(validations)} validations, bad samples: {lines[-1]['bad_samples']}")
    assert complete_iterations(tmp_path / "run" / "checkpoints") == [STEPS - SAVE_INTERVAL, STEPS]

"""The same recipe resumes with any other shipped layout of its stage: order of the samples, schedule, progress.

Without a model: the loaders of all data-parallel ranks read the recipe's order, and Megatron's scheduler gives the
rates. `tests/distributed` resumes real runs in other layouts.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.config.cli import parse_run_config
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.known_models import known_model
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.quarantine import stub_sample
from megatron_ross.training import data as training_data
from megatron_ross.training.build import build_scheduler
from megatron_ross.training.checkpoints import training_record
from megatron_ross.training.resumed import changed_settings, check_trained_parts, group_sizes, plan_start, record_of
from megatron_ross.training.schedule import RunPlan
from megatron_ross.training.start import Start

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
WORLD_SIZES = {"8xa100-80g": 8, "8xh100": 8, "64xh100": 64}
FINETUNE = "ross/finetune_siglip_qwen2.yaml"
RECIPES = {"stage1": "ross/pretrain_siglip_qwen2.yaml", "stage2": FINETUNE, "stage2_packed": FINETUNE}
NUM_SAMPLES = 1111  # five to nine batches in an epoch, the last not full
MODEL = known_model("qwen2-7b+siglip-so400m")
LENGTHS = np.random.default_rng(4).integers(5, 400, NUM_SAMPLES) * np.random.default_rng(5).choice([-1, 1], NUM_SAMPLES)


class Stubs:
    """As many samples of two tokens."""

    image_processor = SimpleNamespace(image_size=14)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Any:
        return stub_sample(index)


class Simulated:
    """A start of a run on all ranks of a cluster, as far as data and schedule go."""

    def __init__(self, stage: str, cluster: str, start: Start, *more: str) -> None:
        number, _, is_packed = stage.partition("_")
        files = [EXAMPLES / "shared" / f"{number}.yaml", EXAMPLES / RECIPES[stage]]
        files.append(EXAMPLES / "layouts" / f"{cluster}-{number}.yaml")
        files += [EXAMPLES / "shared" / f"{stage}.yaml"] if is_packed else []
        self.run = parse_run_config([*(word for file in files for word in ("--config", str(file))), *more])
        check_trained_parts(self.run, start)
        self.changes = changed_settings(self.run, start) if start.resumes else []
        self.sizes = group_sizes(self.run, start)
        self.order: SampleOrder = training_data.build_order(self.run, Stubs(), group_sizes=self.sizes)  # type: ignore[arg-type]
        self.plan: RunPlan = plan_start(self.run, start, self.order)
        self.iteration = self.plan.progress.iteration
        self.optimizer: Any = SimpleNamespace(param_groups=[{}])
        self.scheduler = build_scheduler(
            self.optimizer, self.run.optimizer, self.plan.schedule, self.plan.progress.sequences
        )
        parallel, data = self.run.parallel, self.run.data
        model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        dp_size = WORLD_SIZES[cluster] // model_ranks
        self.loaders = [
            RossLoader(
                Stubs(),
                self.order,
                global_batch_size=data.global_batch_size,
                micro_batch_size=data.micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
                pack_length=data.seq_length if data.packing else None,
                want_pixels=False,
                prefetch=0,
                num_workers=1,
            )
            for rank in range(dp_size)
        ]
        if start.resumes:
            for loader in self.loaders:
                loader.load_state_dict(start.manifest.training["data"])

    def steps(self, until: int) -> list[tuple[int, float, list[int]]]:
        """(iteration, learning rate, samples) of each; samples by their place in the global batch."""
        done = []
        while self.iteration < min(until, self.plan.train_iters):
            rate = self.optimizer.param_groups[0]["lr"]
            of_ranks = [[batch.sample_ids for batch in loader.next_step()] for loader in self.loaders]
            samples = [i for row in zip(*of_ranks, strict=True) for ids in row for i in ids]
            self.scheduler.step(self.run.data.global_batch_size)
            self.iteration += 1
            done.append((self.iteration, rate, samples))
        return done

    def saved(self) -> Start:
        record = record_of(self.plan, self.sizes)
        training = training_record({}, self.run, self.loaders[0].state_dict(), "", record)
        return Start(Path("iter"), Manifest(self.iteration, MODEL, training=training), True)

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


@pytest.fixture(autouse=True)
def lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "modality_lengths", lambda dataset, **_: LENGTHS)
    monkeypatch.setattr(training_data, "token_lengths", lambda dataset, **_: 5 * np.abs(LENGTHS))


FRESH = Start(Path("init"), Manifest(0, MODEL), False)


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize(("first", "second"), itertools.product(WORLD_SIZES, WORLD_SIZES))
def test_the_same_recipe_goes_on_with_another_shipped_layout(stage: str, first: str, second: str) -> None:
    alone = Simulated(stage, first, FRESH)
    whole = alone.steps(10**6)
    batch = alone.run.data.global_batch_size
    assert len(whole) == alone.plan.train_iters == -(-alone.order.epoch_length(0) // batch)
    assert sorted([i for _, _, samples in whole for i in samples][:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    before = Simulated(stage, first, FRESH)
    done = before.steps(2)
    after = Simulated(stage, second, before.saved())
    done += after.steps(10**6)
    assert done == whole
    assert after.loaders[0].state_dict() == alone.loaders[0].state_dict()
    layout = {f.split()[0] for f in after.changes}
    assert layout <= set(RunConfig().to_flat()) - {"global_batch_size", "lr", "num_epochs", "seed"}
    back = Simulated(stage, first, after.saved())  # the order is still that of the first start
    assert back.sizes == before.sizes
    assert back.steps(10**6) == []
    for simulated in (alone, before, after, back):
        simulated.close()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("batch", [64, 512])
def test_so_it_does_with_another_global_batch_size(stage: str, batch: int) -> None:
    """The order goes on where it was; every sample is seen as often as num_epochs says."""
    before = Simulated(stage, "8xh100", FRESH)
    done = before.steps(2)
    start = before.saved()
    after = Simulated(stage, "8xh100", start, "--global-batch-size", str(batch), "--num-epochs", "2")
    done += after.steps(10**6)
    seen = [i for _, _, samples in done for i in samples]
    assert 2 * NUM_SAMPLES <= len(seen) < 2 * NUM_SAMPLES + batch
    for epoch in range(2):
        assert sorted(seen[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    assert [iteration for iteration, _, _ in done] == list(range(1, len(done) + 1))
    assert min(rate for _, rate, _ in done[1:]) > 0
    for simulated in (before, after):
        simulated.close()

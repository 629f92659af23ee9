"""Length and learning rate of a run: as ever where batches never change, and by samples where they do."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig, TrainingConfig
from megatron_ross.data.order import SampleOrder
from megatron_ross.training.build import build_scheduler
from megatron_ross.training.schedule import (
    BatchHistory,
    BatchSpan,
    Progress,
    RunPlan,
    Schedule,
    has_ended,
    num_iterations,
    plan_training,
)

ORDER = SampleOrder(30)


def config(**flat: Any) -> RunConfig:
    return RunConfig.from_flat({"lr": 1e-2, "global_batch_size": 4, **flat})


def at(iteration: int, size: int = 4, continued_at: int | None = None) -> Progress:
    return Progress(iteration, iteration * size, BatchHistory.constant(size), continued_at)


def rates(run: RunConfig, plan: RunPlan) -> list[float]:
    """The learning rate of every iteration that is left, by Megatron's scheduler."""
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    scheduler = build_scheduler(optimizer, run.optimizer, plan.schedule, plan.progress.sequences)
    found = []
    for _ in range(plan.train_iters - plan.progress.iteration):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(run.data.global_batch_size)
    return found


def by_iterations(run: RunConfig, train_iters: int, iteration: int) -> float:
    """As a run that counts iterations has it: warm-up from 0, then cosine or linear."""
    o = run.optimizer
    warmup = o.lr_warmup_iters
    if warmup is None:
        warmup = math.ceil((o.lr_warmup_fraction or 0.0) * train_iters)
    warmup = min(warmup, train_iters - 1)
    if iteration <= warmup and warmup > 0:
        return o.lr * iteration / warmup
    if o.lr_decay_style == "constant":
        return o.lr
    way = (iteration - warmup) / (train_iters - warmup)
    share = 1.0 - way if o.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * way) + 1.0)
    return o.min_lr + share * (o.lr - o.min_lr)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [{"lr_warmup_fraction": 0.07}, {"lr_warmup_fraction": None}, {"lr_warmup_iters": 9}])
@pytest.mark.parametrize(("size", "train_iters"), [(4, 100), (96, 29), (7, 1), (12, 200)])
def test_with_one_batch_size_the_rates_are_those_of_iterations(
    style: str, warmup: dict[str, Any], size: int, train_iters: int
) -> None:
    """Wherever such a run is stopped and goes on, to the last bit."""
    run = config(lr_decay_style=style, min_lr=1e-3, global_batch_size=size, train_iters=train_iters, **warmup)
    whole = rates(run, plan_training(run, ORDER, None))
    assert whole == pytest.approx([by_iterations(run, train_iters, i) for i in range(train_iters)], rel=1e-12)
    for stop in range(0, train_iters, 13):
        plan = plan_training(run, ORDER, at(stop, size))
        assert plan.train_iters == train_iters
        assert rates(run, plan) == whole[stop:]


def test_the_rounding_of_the_warm_up_is_that_of_iterations() -> None:
    for train_iters in range(1, 300):
        for share in (0.03, 0.07, 0.1, 0.5, 1.0):
            for size in (1, 12, 96):
                run = config(train_iters=train_iters, global_batch_size=size, lr_warmup_fraction=share)
                expected = min(math.ceil(share * train_iters), train_iters - 1) * size
                for start in (None, at(train_iters // 2, size)):
                    assert plan_training(run, ORDER, start).schedule == Schedule(
                        0, expected, train_iters * size, "cosine"
                    )


@pytest.mark.parametrize("num_epochs", [0.5, 1, 2, 3.25])
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (6, 1), (5, 64)])
def test_epochs_mean_every_sample_that_often_with_any_batches(num_epochs: float, sizes: tuple[int, int]) -> None:
    """The last step of a run may reach into the next epoch, by less than a batch."""
    first, second = sizes
    wanted = math.ceil(num_epochs * 30)
    progress = at(2, first)
    plan = plan_training(config(num_epochs=num_epochs, global_batch_size=second), ORDER, progress)
    assert plan.progress.sequences == 2 * first
    trained = plan.num_sequences
    assert trained == 2 * first + (plan.train_iters - 2) * second
    if wanted > 2 * first:
        assert wanted <= trained < wanted + second
    else:
        assert plan.train_iters == 2


def test_the_number_of_iterations_is_that_of_the_run_so_far_and_what_is_left() -> None:
    run = config(num_epochs=2, global_batch_size=8)
    assert num_iterations(run, ORDER) == 8  # 60 samples
    assert num_iterations(run, ORDER, at(5)) == 5 + 5  # 40 are left
    assert num_iterations(config(train_iters=7, global_batch_size=8), ORDER, at(5)) == 7
    assert num_iterations(config(train_iters=3), ORDER, at(5)) == 5
    assert num_iterations(config(num_epochs=0), ORDER) == 1


def test_iterations_of_settings_are_those_that_the_run_has_had() -> None:
    batches = BatchHistory.constant(4).then(10, 40, 8).then(10, 40, 16).then(20, 200, 2)
    assert batches.spans == (BatchSpan(0, 0, 4), BatchSpan(10, 40, 16), BatchSpan(20, 200, 2))
    assert batches.then(30, 220, 2) is batches
    assert [batches.sequences_at(i) for i in (-1, 0, 5, 10, 11, 20, 25)] == [0, 0, 20, 40, 56, 200, 210]
    # A share of the samples, rounded up to the end of an iteration, of the batch size that it had.
    ends = [batches.warmup_end(0, 400, share) for share in (0, 0.03, 0.1, 0.11, 0.5, 0.5025, 1)]
    assert ends == [0, 12, 40, 56, 200, 202, 400]


def test_a_run_past_its_warm_up_stays_so_with_larger_batches() -> None:
    run = config(lr_warmup_iters=10, train_iters=40, global_batch_size=400)
    plan = plan_training(run, ORDER, at(20))
    assert plan.schedule == Schedule(0, 40, 80 + 20 * 400, "cosine")
    assert rates(run, plan)[0] == pytest.approx(1e-2, rel=1e-3)
    share = config(lr_warmup_fraction=0.005, train_iters=40, global_batch_size=400)
    assert plan_training(share, ORDER, at(20)).schedule.warmup == 44  # 0.005 * 8080 = 40.4


def test_a_run_that_is_made_longer_on_its_way_follows_the_new_schedule() -> None:
    run = config(train_iters=20)
    plan = plan_training(run, ORDER, at(9))  # of 10 before; min_lr is 0
    assert rates(run, plan) == rates(run, plan_training(run, ORDER, None))[9:]
    assert min(rates(run, plan)) > 0


def test_whether_a_run_has_ended_is_what_its_own_settings_say() -> None:
    assert has_ended(TrainingConfig(train_iters=5), ORDER, at(5))
    assert not has_ended(TrainingConfig(train_iters=6, num_epochs=0), ORDER, at(5))
    assert has_ended(TrainingConfig(num_epochs=1), ORDER, at(8))
    assert not has_ended(TrainingConfig(num_epochs=1), ORDER, at(7))


@pytest.mark.parametrize(
    ("flat", "says"), [({"num_epochs": 2.5}, "num_epochs=2.5: "), ({"train_iters": 30}, "train_iters=30: ")]
)
def test_a_run_that_had_ended_goes_on_only_where_a_setting_says_how(flat: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{says}the run to resume had ended after iteration 8, .* set lr_con"):
        plan_training(config(**flat), ORDER, at(8), had_ended=True)
    with pytest.raises(ConfigError, match="after iteration 8 and has gone on to iteration 9"):
        plan_training(config(**flat), ORDER, at(9, continued_at=8))
    plan_training(config(lr_decay_style="constant", **flat), ORDER, at(8), had_ended=True)


def test_one_that_has_nothing_left_ends_without_a_word() -> None:
    plan = plan_training(config(num_epochs=1), ORDER, at(8), had_ended=True)
    assert (plan.train_iters, plan.progress.continued_at) == (8, None)
    assert plan_training(config(train_iters=3), ORDER, at(8), had_ended=True).train_iters == 8


LONGER = {"num_epochs": 2, "min_lr": 1e-4, "lr_warmup_fraction": 0.2}


def test_going_on_at_a_constant_rate() -> None:
    run = config(lr_continue="constant", **LONGER)
    assert rates(run, plan_training(run, ORDER, at(8), had_ended=True)) == [1e-2] * 7


def test_going_on_with_a_new_warm_up() -> None:
    run = config(lr_continue="rewarm", **LONGER)
    plan = plan_training(run, ORDER, at(8), had_ended=True)
    alone = config(train_iters=7, min_lr=1e-4, lr_warmup_fraction=0.2)
    assert rates(run, plan) == pytest.approx(rates(alone, plan_training(alone, ORDER, None)))
    in_iterations = config(lr_continue="rewarm", lr_warmup_iters=3, num_epochs=2)
    assert rates(in_iterations, plan_training(in_iterations, ORDER, at(8), had_ended=True))[:4] == pytest.approx(
        [0, 1e-2 / 3, 2e-2 / 3, 1e-2]
    )


def test_going_on_with_the_schedule_of_the_longer_run() -> None:
    run = config(lr_continue="schedule", **LONGER)
    got = rates(run, plan_training(run, ORDER, at(8), had_ended=True))
    assert got == rates(run, plan_training(run, ORDER, None))[8:]


@pytest.mark.parametrize("how", ["constant", "rewarm", "schedule"])
def test_a_run_that_goes_on_may_be_stopped_and_goes_on(how: str) -> None:
    """Its new start is part of its progress, also with other batches."""
    run = config(lr_continue=how, **LONGER)
    plan = plan_training(run, ORDER, at(8), had_ended=True)
    assert plan.progress.continued_at == 8
    assert rates(run, plan_training(run, ORDER, at(11, continued_at=8))) == rates(run, plan)[3:]
    other = config(lr_continue=how, **LONGER | {"global_batch_size": 2})
    again = plan_training(other, ORDER, at(11, continued_at=8))
    assert rates(other, again)[::2] == pytest.approx(rates(run, plan)[3:], rel=0.2)
    twice = plan_training(config(lr_continue=how, num_epochs=3), ORDER, at(15, continued_at=8), had_ended=True)
    assert twice.progress.continued_at == 15
    assert all(rate > 0 for rate in rates(run, plan)[how == "rewarm" :])

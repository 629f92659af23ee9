"""Steps that train nothing: which ones count, and when they end a run."""

from __future__ import annotations

import pytest

from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.workload import Work
from megatron_ross.training.empty_steps import EmptySteps
from megatron_ross.training.errors import TrainingError

MANY = 10**6


def work(tokens: int, images: int) -> Work:
    return Work(100, 100, tokens, images, images)


GOOD = work(30, 2), 0.5
NO_TOKEN = work(0, 2), 0.5
NO_GRADIENT = work(30, 2), 0.0


def guard(steps_per_epoch: int = MANY, train_iters: int = MANY, **settings: float) -> EmptySteps:
    return EmptySteps(RunConfig.from_flat(settings), steps_per_epoch, train_iters)


@pytest.mark.parametrize(
    ("step", "reason"), [(NO_TOKEN, "no supervised token"), (NO_GRADIENT, "gradient norm of exactly 0")]
)
def test_too_many_in_a_row_stop_with_the_reason(step: tuple[Work, float], reason: str) -> None:
    empty = guard(max_empty_steps=3)
    for iteration, looked_at in enumerate((step, step, GOOD, step, step), start=1):
        empty.look(iteration, *looked_at)
    assert (empty.total, empty.in_a_row) == (4, 2)
    with pytest.raises(TrainingError, match=rf"iterations 4 to 6 trained nothing: .*{reason}.*max_empty_steps=3"):
        empty.look(6, *step)


def test_the_default_is_twenty() -> None:
    empty = guard()
    for iteration in range(1, 20):
        empty.look(iteration, *NO_TOKEN)
    with pytest.raises(TrainingError, match="iterations 1 to 20"):
        empty.look(20, *NO_TOKEN)


@pytest.mark.parametrize("shorter", [{"steps_per_epoch": 2}, {"train_iters": 2}])
def test_an_epoch_or_a_run_is_enough(shorter: dict[str, int]) -> None:
    empty = guard(**shorter)
    empty.look(1, *NO_TOKEN)
    with pytest.raises(TrainingError, match="iterations 1 to 2"):
        empty.look(2, *NO_TOKEN)


def test_a_good_step_is_none() -> None:
    empty = guard(1, 1, max_empty_steps=1)
    for iteration, (tokens, images) in enumerate(((1, 0), (1, 1), (50, 0)), start=1):
        empty.look(iteration, work(tokens, images), 1e-12)
    empty.look(4, work(1, 1), float("nan"))  # the guard of non-finite steps looks at that
    assert empty.total == 0


def test_without_a_language_loss_images_are_what_counts() -> None:
    empty = guard(lm_loss_weight=0, max_empty_steps=2)
    empty.look(1, work(0, 1), 0.1)
    empty.look(2, work(0, 0), 0.0)
    with pytest.raises(TrainingError, match=r"no image to reconstruct.*lm_loss_weight=0"):
        empty.look(3, work(0, 0), 0.0)

"""Measuring lengths takes long: it keeps its parts, tells the watchdog, and uses the cores that it may use."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ross.data import lengths
from megatron_ross.data.errors import RecordError
from megatron_ross.data.lengths import available_cores, modality_lengths, token_lengths
from megatron_ross.text_files import replace_text
from megatron_ross.training.watchdog import Watchdog


class Samples:
    """Lengths that tell samples apart; the one called `broken` has no usable record."""

    fingerprint = records_fingerprint = "some records"
    broken = 17

    def __init__(self, size: int, seconds: float = 0.0, dies_at: int | None = None) -> None:
        self.size, self.seconds, self.dies_at, self.measured = size, seconds, dies_at, 0

    def __len__(self) -> int:
        return self.size

    def token_length(self, index: int) -> int:
        if index == self.dies_at:
            if multiprocessing.parent_process() is not None:
                os._exit(9)
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        self.measured += 1
        if index == self.broken:
            raise RecordError("broken")
        return 3 + index * 7 % 101

    def modality_length(self, index: int) -> int:
        return (-1) ** index * (1 + index)


EXPECTED = [1 if i == Samples.broken else 3 + i * 7 % 101 for i in range(1000)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_CHUNK", 10)
    monkeypatch.setattr(lengths, "_PART", 40)
    monkeypatch.setattr(lengths, "_POLL_S", 0.02)


def parts_of(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("lengths/*.parts/*.npy"))


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    killed = Samples(300, dies_at=155)
    with pytest.raises(KeyboardInterrupt):
        token_lengths(killed, cache_folder=tmp_path)
    assert parts_of(tmp_path) == ["000000000040.npy", "000000000080.npy", "000000000120.npy"]
    again, said = Samples(300), list[str]()
    found = token_lengths(again, cache_folder=tmp_path, beat=said.append)
    assert found.dtype == np.int32
    assert found.tolist() == EXPECTED[:300]
    assert again.measured == 180
    assert said[0] == "measuring samples, 130 of 300"
    assert parts_of(tmp_path) == []
    third = Samples(300)
    assert token_lengths(third, cache_folder=tmp_path).tolist() == EXPECTED[:300]
    assert third.measured == 0


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY half"])
def test_a_damaged_part_is_measured_again(damage: bytes, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        token_lengths(Samples(300, dies_at=155), cache_folder=tmp_path)
    (second,) = tmp_path.glob("lengths/*.parts/000000000080.npy")
    second.write_bytes(damage)
    again = Samples(300)
    assert token_lengths(again, cache_folder=tmp_path).tolist() == EXPECTED[:300]
    assert again.measured == 260


def test_words_have_parts_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        token_lengths(Samples(300, dies_at=155), cache_folder=tmp_path)
    assert modality_lengths(Samples(300), cache_folder=tmp_path).tolist() == [(-1) ** i * (1 + i) for i in range(300)]
    assert len(parts_of(tmp_path)) == 3


def ended_by_watchdog(limit_s: float, work: Callable[[Callable[[str], None]], object]) -> bool:
    """Whether a watchdog would have ended the process while `work` ran."""
    ended = threading.Event()

    class Dog(Watchdog):
        def _end_the_run(self) -> None:
            ended.set()
            self._stop.set()

    dog = Dog(limit_s, None)
    dog.beat("start")
    try:
        work(dog.beat)
    finally:
        dog.stop()
    return ended.is_set()


def test_measuring_outlasts_the_watchdog(tmp_path: Path) -> None:
    """2 s of work, of which none takes longer than 0.1 s; the limit is 0.8 s."""

    def measure(beat: Callable[[str], None] | None, name: str) -> None:
        token_lengths(Samples(200, seconds=0.01), cache_folder=tmp_path / name, beat=beat)

    assert not ended_by_watchdog(0.8, lambda beat: measure(beat, "a"))
    assert ended_by_watchdog(0.8, lambda _: measure(None, "b"))


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_process_that_waits_trusts_one_that_gets_on_and_no_other(gets_on: bool, tmp_path: Path) -> None:
    """Another process holds the lock for 2 s; this one's limit is 0.8 s."""
    at_work, slow = threading.Event(), Samples(200, seconds=0.01)
    if not gets_on:
        slow.seconds = 0.0
        slow_length = slow.token_length
        slow.token_length = lambda i: (time.sleep(2.0) if i == 60 else None, slow_length(i))[1]  # type: ignore[method-assign]

    def other() -> None:
        token_lengths(slow, cache_folder=tmp_path, beat=lambda _: at_work.set())

    thread = threading.Thread(target=other)
    thread.start()
    assert at_work.wait(10)
    waiting = Samples(200)
    ended = ended_by_watchdog(0.8, lambda beat: token_lengths(waiting, cache_folder=tmp_path, beat=beat))
    thread.join()
    assert ended != gets_on
    assert waiting.measured == 0


def test_a_worker_that_dies_is_one_line_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_SPAWN_ABOVE", 100)
    with pytest.raises(OSError, match="measuring samples: a worker process ended") as caught:
        token_lengths(Samples(1000, dies_at=555), cache_folder=tmp_path, num_workers=2)
    assert "\n" not in str(caught.value)
    kept = 40 * len(parts_of(tmp_path))
    assert 0 < kept <= 555
    again, said = Samples(1000), list[str]()
    assert token_lengths(again, cache_folder=tmp_path, num_workers=2, beat=said.append).tolist() == EXPECTED
    assert said[0] == f"measuring samples, {kept + 10} of 1,000"
    assert again.measured == 0, "workers did it"


def _measure_for_ever(folder: Path) -> None:
    lengths._SPAWN_ABOVE, lengths._CHUNK = 0, 10

    def note(_: str) -> None:
        replace_text(folder / "workers", " ".join(str(child.pid) for child in multiprocessing.active_children()))

    token_lengths(Samples(10**6, seconds=0.01), cache_folder=folder, num_workers=2, beat=note)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def test_workers_leave_with_a_process_that_is_killed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_measure_for_ever, args=(tmp_path,))
    process.start()
    try:
        assert _wait_for((tmp_path / "workers").exists)
        workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
        assert len(workers) == 2
        assert all(map(_runs, workers))
    finally:
        process.kill()
        process.join()
    assert _wait_for(lambda: not any(map(_runs, workers)))


def test_all_cores_that_may_be_used_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3, 16)))
    cores = available_cores()
    assert 1 <= cores <= 13
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000\n")
    assert available_cores() == 13
    monkeypatch.setattr(Path, "read_text", lambda _: "250000 100000\n")
    assert available_cores() == 3
    asked: list[int] = []

    def pieces(dataset: object, function: object, indices: range, num_workers: int, *rest: object):
        asked.append(num_workers)
        return iter([[1] * len(indices)])

    monkeypatch.setattr(lengths, "map_samples", pieces)
    token_lengths(Samples(20), cache_folder=tmp_path)
    modality_lengths(Samples(20), cache_folder=tmp_path)
    assert asked == [3, 3]

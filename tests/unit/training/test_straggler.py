"""Megatron's straggler detector needs a GPU; what we ask of it is checked against its signatures."""

from __future__ import annotations

import inspect
import logging
from unittest import mock

import pytest
from megatron.core.utils import StragglerDetector

from megatron_ross.platform import show_log
from megatron_ross.training import straggler


def test_the_detector_is_asked_what_it_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = mock.create_autospec(StragglerDetector, instance=True)
    monkeypatch.setattr(straggler, "StragglerDetector", lambda: detector)
    monkeypatch.setattr(straggler, "show_log", lambda name: None)
    monkeypatch.setattr(straggler.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(straggler.dist, "get_rank", lambda: 3)
    report = straggler.StragglerReport(enabled=True)
    report.step()
    report.report(1e15, 10)
    detector.configure.assert_called_once_with(8, 3, mmcnt=4, amp=1.0, enabled=True)
    assert detector.call_args_list == [mock.call(bdata=False)]
    inspect.signature(StragglerDetector.__call__).bind(detector, bdata=False)
    detector.report.assert_called_once_with(1e15, 10)


def test_nothing_is_asked_when_it_is_off() -> None:
    report = straggler.StragglerReport(enabled=False)
    with report.step():
        report.report(1e15, 10)


def test_a_hidden_log_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """As Megatron's loggers are: a child of one that shows errors only."""
    logging.getLogger("hidden").setLevel(logging.ERROR)
    logger = logging.getLogger("hidden.report")
    logger.info("lost")
    for _ in range(2):
        show_log("hidden.report")
    logger.info("slowest rank 3")
    assert capsys.readouterr().out == "slowest rank 3\n"

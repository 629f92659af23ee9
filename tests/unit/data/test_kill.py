"""A run killed by SIGKILL in the middle of an epoch: both runs together consume every sample exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.lengths import measure
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.packing import PackedOrder

ROOT = Path(__file__).parents[3]

RUN = textwrap.dedent(
    """
    import json, os, sys, time
    from pathlib import Path
    from transformers import AutoTokenizer
    sys.path.insert(0, sys.argv[4])
    from test_kill import make_loader
    folder, tokenizer, packed = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "packed"
    loader = make_loader(folder, AutoTokenizer.from_pretrained(tokenizer), packed, prefetch=4, num_workers=2)
    while True:
        ids = [i for batch in loader.next_step() for i in batch.sample_ids]
        state = {"loader": loader.state_dict(), "ids": ids}
        path = folder / f"step-{loader.consumed_sequences:06}.json"
        path.with_suffix(".tmp").write_text(json.dumps(state))
        os.replace(path.with_suffix(".tmp"), path)
        time.sleep(0.05)
    """
)


def make_loader(folder: Path, tokenizer, packed: bool, **settings) -> RossLoader:
    """The toy data set in batches of 2, or of 2 packs."""
    from megatron_ross.data.images import ImageProcessor

    processor = ImageProcessor((0.5,) * 3, (0.5,) * 3, 56)
    dataset = RossDataset(folder / "data.json", folder / "images", tokenizer, "qwen_2", processor, 16, 200)
    order = SampleOrder(len(dataset), seed=7)
    if packed:
        order = PackedOrder(order, measure(dataset, 1, False), 200)
        settings["pack_length"] = 200
    return RossLoader(dataset, order, **{"global_batch_size": 2, "micro_batch_size": 1} | settings)


def _kill_after(steps: int, arguments: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], env=environment)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("step-*.json"))) < steps:
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_every_sample_once_over_both_runs(toy, golden, qwen, mode):
    _kill_after(3, [str(toy), str(golden / "llm_qwen2"), mode, str(Path(__file__).parent)], toy)
    saved = [json.loads(path.read_text()) for path in sorted(toy.glob("step-*.json"))]
    consumed = [i for step in saved for i in step["ids"]]
    ranks = [make_loader(toy, qwen, mode == "packed", dp_rank=r, dp_size=2, num_workers=1) for r in range(2)]
    for loader in ranks:
        loader.load_state_dict(saved[-1]["loader"])
    while len(consumed) < 46:
        parts = [loader.next_step() for loader in ranks]
        consumed += [i for pair in zip(*parts, strict=True) for batch in pair for i in batch.sample_ids]
    assert 3 <= len(saved) < 20, "killed in the middle"
    assert sorted(consumed[:23]) == list(range(23))
    assert sorted(consumed[23:46]) == list(range(23))
    for loader in ranks:
        loader.close()

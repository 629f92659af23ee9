"""The way of a model through our programs: import, training on two ranks in two layouts, save, resume, export.

`make test-smoke PYTHON=python3.12` runs this with the newest megatron-core, which Python 3.11 cannot install. All is
started as users start it, in processes of its own: an interpreter or a library may change how they start, too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ross.checkpoint.manifest import CHECKPOINTS_NAME, LATEST_NAME
from megatron_ross.programs import end_group, start_program
from tests.helpers.golden import GOLDEN, checkpoint_dir, metadata
from tests.helpers.sources import ROOT
from tests.helpers.toy_run import write_data

MODEL = "qwen2_siglip"
LIMIT_S = 280.0
LAYOUTS = {
    "tp2": ["--tensor-model-parallel-size", "2", "--sequence-parallel", "true", "--layout", "VEt*4NDH"],
    "pp2": ["--pipeline-model-parallel-size", "2", "--layout", "VEt*2|t*2NDH"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.smoke


def run(log: Path, *command: str | Path) -> None:
    """Run Python with these arguments; its output is the message if it fails."""
    with log.open("w") as output:
        process = start_program([sys.executable, "-W", "ignore", *map(str, command)], ROOT, output)
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process, 5.0)
    assert code == 0, f"{command[0]} ended with {code}:\n{log.read_text()[-4000:]}"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face composite as Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("imported")
    info = metadata()["models"][MODEL]
    parts = ["--vision-tower", GOLDEN / info["vision_tower"], "--vae", GOLDEN / info["auto_encoder"]]
    command = ["tools/convert_hf_to_megatron.py", "--checkpoint", checkpoint_dir(MODEL), *parts]
    run(folder / "log", *command, "--output", folder / "checkpoint")
    return folder / "checkpoint"


def exported(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's export."""
    command = ["tools/convert_megatron_to_hf.py", "--checkpoint", checkpoint, "--format", "ross"]
    run(folder / "export.log", *command, "--output", folder / "export")
    return {n: t for path in (folder / "export").glob("*.safetensors") for n, t in load_file(path).items()}


def train(layout: str, folder: Path, *flags: str | Path) -> dict[int, tuple[float, float]]:
    """Four steps, saved after the second and the fourth; LM loss and gradient norm by step, as logged last."""
    data = folder / "data"
    if not data.exists():
        write_data(data)
    settings = "--seq-length 256 --micro-batch-size 1 --global-batch-size 4 --train-iters 4 --save-interval 2 --lr 1e-3"
    where = ["--data-path", data / "data.json", "--image-folder", data / "images", "--save", folder / "run"]
    command = [*TORCHRUN, "pretrain_ross.py", *settings.split(), "--log-interval", "1", "--tensorboard", "false"]
    run(folder / f"{layout}.log", *command, *LAYOUTS[layout], *where, *flags)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: (line["lm_loss"], line["grad_norm"]) for line in lines if "grad_norm" in line}


@pytest.mark.parametrize(("first", "second"), [("tp2", "pp2"), ("pp2", "tp2")])
def test_train_save_resume_in_another_layout_and_export(
    first: str, second: str, imported: Path, tmp_path: Path
) -> None:
    before = train(first, tmp_path, "--init-from", imported)
    assert sorted(before) == [1, 2, 3, 4]
    checkpoints = tmp_path / "run" / CHECKPOINTS_NAME
    assert (checkpoints / LATEST_NAME).read_text().strip() == "4"
    (checkpoints / LATEST_NAME).write_text("2")
    after = train(second, tmp_path, "--load", tmp_path / "run")
    printed = re.findall(r"^iteration +(\d+)/4 ", (tmp_path / f"{second}.log").read_text(), re.MULTILINE)
    assert printed == ["3", "4"]
    for step in (3, 4):
        assert after[step] == pytest.approx(before[step], rel=2e-3), step
    trained, published = exported(checkpoints, tmp_path), load_file(checkpoint_dir(MODEL) / "model.safetensors")
    assert sorted(trained) == sorted(published)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    assert any(not torch.equal(trained[name], published[name]) for name in published)


def test_an_import_is_exported_to_the_last_bit(imported: Path, tmp_path: Path) -> None:
    got, expected = exported(imported, tmp_path), load_file(checkpoint_dir(MODEL) / "model.safetensors")
    assert sorted(got) == sorted(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)

"""A fixture or checkpoint that cannot be used: one line that names file and tensor, exit code 1, on every rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ross.parity.compare import compare_exact, compare_tensors, compare_values
from megatron_ross.parity.fixture import FixtureError, case_samples, load_fixture
from tests.helpers import golden
from tests.helpers.distributed import run_ranks

MODEL = "qwen2_siglip"
CASE = f"goldens/{MODEL}/case_a_single_image.safetensors"
GRADIENTS = f"goldens/{MODEL}/case_a_grads_stage2.safetensors"
WEIGHTS = "ross_qwen2_siglip/model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
Edit = Callable[[Path], object]


@pytest.fixture
def fixture_copy(tmp_path: Path) -> Path:
    """The golden fixture, its big or unused files as links."""
    target = tmp_path / "fixture"
    shutil.copytree(golden.GOLDEN, target, copy_function=os.link, ignore=shutil.ignore_patterns("images_large"))
    return target


def edit_tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(root: Path) -> None:
        tensors = load_file(root / name)
        change(tensors)
        (root / name).unlink()  # a link: the original stays
        save_file(tensors, root / name, {"format": "pt"})

    return edit


def rewrite(name: str, text: Callable[[str], str]) -> Edit:
    def edit(root: Path) -> None:
        old = (root / name).read_text()
        (root / name).unlink()
        (root / name).write_text(text(old))

    return edit


def put(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: value(tensors[key])})


def without_losses(text: str) -> str:
    values = json.loads(text)
    del values["models"][MODEL]["losses"]
    return json.dumps(values)


def nan_at_17(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[17] = float("nan")
    return tensor


FIXTURE_MISTAKES: dict[str, tuple[Edit, str]] = {
    "missing": (edit_tensors(CASE, lambda t: t.pop("in.labels")), r"case_a_single_image.*: in\.labels is missing"),
    "surplus": (
        edit_tensors(CASE, lambda t: t.update({"in.more": torch.ones(1)})),
        r"case_a_single_image.*: in\.more is not in metadata\.json",
    ),
    "shape": (
        edit_tensors(GRADIENTS, put(Q, lambda t: t[:32].clone())),
        rf"case_a_grads_stage2.*: {Q} is \[32, 64\], metadata\.json says \[64, 64\]",
    ),
    "nan": (edit_tensors(CASE, put("draw.eps", nan_at_17)), r"case_a_single_image.*: draw\.eps holds NaN"),
    "truncated": (rewrite("metadata.json", lambda text: text[:999]), r"metadata\.json: .*(char|line)"),
    "not a fixture": (rewrite("metadata.json", lambda text: "{}"), r"metadata\.json: no entry `models`"),
    "no losses": (rewrite("metadata.json", without_losses), r"models\.qwen2_siglip has no entry 'losses'"),
    "no case": (lambda root: (root / CASE).unlink(), r"no file case_a_"),
    "damaged": (
        lambda root: ((root / CASE).unlink(), (root / CASE).write_bytes(b"no safetensors")),
        r"case_a_single_image",
    ),
}


@pytest.mark.parametrize("mistake", FIXTURE_MISTAKES)
def test_bad_fixtures_are_refused_before_anything_starts(mistake: str, fixture_copy: Path) -> None:
    edit, message = FIXTURE_MISTAKES[mistake]
    edit(fixture_copy)
    with pytest.raises(FixtureError, match=message) as caught:
        load_fixture(fixture_copy)
    assert "\n" not in str(caught.value)


def test_unknown_model_is_refused() -> None:
    with pytest.raises(FixtureError, match=r"no model 'qwen3'; it has qwen2_siglip, llama_clip"):
        load_fixture(golden.GOLDEN, "qwen3")


def test_a_case_of_another_vocabulary_or_image_size_is_refused() -> None:
    (fixture,) = load_fixture(golden.GOLDEN, MODEL)
    model = golden.model_config(MODEL)
    small = replace(model, language=replace(model.language, vocab_size=100))
    with pytest.raises(FixtureError, match=r"case a: in\.input_ids holds id \d+, .* a vocabulary of 100"):
        case_samples(fixture.case("a"), small)
    larger = replace(model, vision=replace(model.vision, hf_config=model.vision.hf_config | {"image_size": 70}))
    with pytest.raises(FixtureError, match=r"case a: in\.images is \[2, 3, 56, 56\], .*needs \[\.\.\., 3, 70, 70\]"):
        case_samples(fixture.case("a"), larger)


CHECKPOINT_MISTAKES: dict[str, tuple[Edit, str]] = {
    "nan": (edit_tensors(WEIGHTS, put(Q, nan_at_17)), f"{Q} holds 1 NaN or Inf of 4096 numbers"),
    "missing": (edit_tensors(WEIGHTS, lambda t: t.pop(Q)), f"missing 1: {Q}"),
    "surplus": (edit_tensors(WEIGHTS, lambda t: t.update({"odd.weight": torch.ones(2)})), "unknown 1: odd.weight"),
    "shape": (edit_tensors(WEIGHTS, put(Q, lambda t: t[:32].clone())), f"{Q} is [32, 64]"),
    "vocabulary": (
        rewrite("ross_qwen2_siglip/config.json", lambda text: text.replace('"vocab_size": 576', '"vocab_size": 500')),
        "the tokenizer's largest id is 575, but vocab_size is 500",
    ),
    "json": (rewrite("ross_qwen2_siglip/config.json", lambda text: text[:-9]), "config.json is not valid JSON"),
}


def messages_on_ranks(rank: int, world_size: int, root: str) -> str:
    """What importing the fixture's checkpoint raises on this rank."""
    from megatron_ross.parity.runner import ImportedModel
    from megatron_ross.platform import ensure_platform

    ensure_platform()
    (fixture,) = load_fixture(Path(root), MODEL)
    try:
        ImportedModel(fixture).close()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mistake", CHECKPOINT_MISTAKES)
def test_bad_checkpoints_are_named_on_every_rank(mistake: str, fixture_copy: Path) -> None:
    edit, message = CHECKPOINT_MISTAKES[mistake]
    edit(fixture_copy)
    found = run_ranks(messages_on_ranks, 2, str(fixture_copy))
    assert all(message in text and "\n" not in text for text in found), found


def test_the_tool_exits_with_1_on_every_rank(fixture_copy: Path, repository: Path) -> None:
    """Under torchrun, which reports the exit codes; a hang would run into the limit."""
    CHECKPOINT_MISTAKES["nan"][0](fixture_copy)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    tool = [str(repository / "tools" / "check_parity.py"), "--fixture", str(fixture_copy), "--model", MODEL]
    started = subprocess.Popen([*command, *tool], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = started.communicate(timeout=300)
    finally:
        started.terminate()  # not kill: torchrun then ends its ranks
        started.wait()
    assert started.returncode == 1
    assert f"error: {fixture_copy / WEIGHTS}: {Q} holds 1 NaN" in errors


def test_comparisons_fail_on_differences_of_every_kind() -> None:
    ones = torch.ones(4)
    assert compare_tensors("x", ones, ones, 1e-6).ok
    assert not compare_tensors("x", ones * (1 + 1e-5), ones, 1e-6).ok
    assert not compare_tensors("x", nan_at_17(torch.ones(20)), torch.ones(20), 1e9).ok
    assert not compare_tensors("x", torch.ones(5), ones, 1e9).ok
    assert not compare_values("x", float("nan"), 1.0, 1e9).ok
    assert not compare_values("x", 1e-7, 0.0, 1e-9).ok
    assert compare_exact("x", [1, 2], [1, 2]).ok
    assert not compare_exact("x", [1, 2], [1, 3]).ok
    assert not compare_exact("x", [1, 2], [1, 2, 3]).ok

"""Reading checkpoints: Megatron's own files, chunks, chains of partial checkpoints, damaged and hostile files."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, iteration_dir, write_latest
from megatron_ross.checkpoint.reader import open_checkpoint, read_index
from megatron_ross.config.model import LanguageModelConfig, RossModelConfig, VisionConfig
from megatron_ross.convert.known_models import known_model
from megatron_ross.convert.torch_dist_writer import LazyTensor, write_torch_dist
from megatron_ross.platform import ensure_platform
from tests.helpers.distributed import run_ranks

EMBEDDING, FC2, TOWER = "embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc2.weight", "vision.tower.x"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, which Megatron's load and save ask for."""
    meeting = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model() -> RossModelConfig:
    language = LanguageModelConfig("llama", 1, 8, 16, 2, 2, 4, 12, 64, 1e4, 1e-5, False, True)
    return RossModelConfig(language, VisionConfig({"model_type": "clip_vision_model"}, (0.0,) * 3, (1.0,) * 3))


def _prepare(root: Path, model: RossModelConfig, base: str | None = None, assets: bool = True) -> Path:
    directory = iteration_dir(root, 0)
    directory.mkdir(parents=True)
    if assets:
        (directory / ASSETS_NAME).mkdir()
    Manifest(0, model, base=base).write(directory)
    write_latest(root, 0)
    return directory


def _write(root: Path, model: RossModelConfig, tensors: dict[str, Tensor], base: str | None = None) -> Path:
    directory = _prepare(root, model, base, assets=base is None)
    lazy = {key: LazyTensor(tuple(t.shape), t.dtype, t.clone) for key, t in tensors.items()}
    write_torch_dist(directory, lazy)
    return directory


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        EMBEDDING: torch.randn(12, 8),
        FC2: torch.randn(8, 16).bfloat16(),
        TOWER: torch.randn(3),
        "optimizer.state.exp_avg": torch.zeros(3),
    }


def test_reads_what_was_written_and_hides_the_optimizer(
    tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]
) -> None:
    _write(tmp_path, model, tensors)
    reader = open_checkpoint(tmp_path)
    assert reader.keys() == sorted([EMBEDDING, FC2, TOWER])
    for key in reader.keys():  # noqa: SIM118
        assert torch.equal(reader.read(key), tensors[key])
        assert (reader.shape(key), reader.dtype(key)) == (tuple(tensors[key].shape), tensors[key].dtype)


def test_unknown_key_is_an_error(tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]) -> None:
    _write(tmp_path, model, tensors)
    with pytest.raises(ValueError, match=r"has no tensor decoder\.nothing"):
        open_checkpoint(tmp_path).read("decoder.nothing")


@pytest.mark.usefixtures("one_rank")
def test_megatron_loads_tensor_parallel_shards_of_our_files(
    tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]
) -> None:
    """Two-way cuts of both axes, and a vocabulary padded to 16 rows, as a trainer asks for them."""
    directory = _write(tmp_path, model, tensors)
    halves = []
    for rank in range(2):
        wanted = {
            "fc2": ShardedTensor.from_rank_offsets(FC2, torch.empty(8, 8, dtype=torch.bfloat16), (1, rank, 2)),
            "embedding": ShardedTensor.from_rank_offsets(
                EMBEDDING, torch.empty(8, 8), (0, rank, 2), allow_shape_mismatch=True
            ),
        }
        halves.append(dist_checkpointing.load(wanted, str(directory), validate_access_integrity=False))
    assert torch.equal(torch.cat([half["fc2"] for half in halves], dim=1), tensors[FC2])
    assert torch.equal(torch.cat([half["embedding"] for half in halves])[:12], tensors[EMBEDDING])


def _save_halves(rank: int, world_size: int, directory: Path, tensors: dict[str, Tensor]) -> None:
    """Every rank saves its rows of the embedding and its columns of fc2."""
    ensure_platform()
    cuts = {EMBEDDING: 0, FC2: 1}
    state = {
        key: ShardedTensor.from_rank_offsets(
            key, tensors[key].chunk(world_size, dim=axis)[rank].clone(), (axis, rank, world_size)
        )
        for key, axis in cuts.items()
    }
    dist_checkpointing.save(state, str(directory))


def test_reads_chunks_that_megatron_saved_on_two_ranks(
    tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]
) -> None:
    run_ranks(_save_halves, 2, _prepare(tmp_path, model), tensors)
    reader = open_checkpoint(tmp_path)
    assert torch.equal(reader.read(EMBEDDING), tensors[EMBEDDING])
    assert torch.equal(reader.read(FC2), tensors[FC2])


def test_partial_checkpoints_fall_back_on_their_base(
    tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]
) -> None:
    """The upper one wins; what it lacks, assets included, comes from the base, found relative to the iteration."""
    _write(tmp_path / "base", model, tensors)
    trained = torch.randn(3)
    _write(tmp_path / "run", model, {TOWER: trained}, base="../../base")
    reader = open_checkpoint(tmp_path / "run")
    assert torch.equal(reader.read(TOWER), trained)
    assert torch.equal(reader.read(FC2), tensors[FC2])
    assert reader.assets == tmp_path / "run" / "iter_0000000" / "../../base/iter_0000000" / ASSETS_NAME


def test_absolute_base(tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]) -> None:
    _write(tmp_path / "base", model, tensors)
    _write(tmp_path / "run", model, {}, base=str(tmp_path / "base"))
    assert torch.equal(open_checkpoint(tmp_path / "run").read(FC2), tensors[FC2])


def test_a_circle_of_bases_is_refused(tmp_path: Path, model: RossModelConfig) -> None:
    _write(tmp_path / "a", model, {TOWER: torch.zeros(1)}, base="../../b")
    _write(tmp_path / "b", model, {TOWER: torch.zeros(1)}, base="../../a")
    with pytest.raises(ValueError, match="circle"):
        open_checkpoint(tmp_path / "a")


def test_a_base_of_another_model_is_refused(tmp_path: Path, model: RossModelConfig) -> None:
    wider = dataclasses.replace(model, language=dataclasses.replace(model.language, hidden_size=16))
    _write(tmp_path / "base", wider, {TOWER: torch.zeros(1)})
    _write(tmp_path / "run", model, {TOWER: torch.zeros(1)}, base="../../base")
    with pytest.raises(ValueError, match="holds another model"):
        open_checkpoint(tmp_path / "run")


def test_a_base_that_was_trained_otherwise_is_the_same_model(
    tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]
) -> None:
    """What the run's images were is in the upper manifest; tensors fit all the same."""
    _write(tmp_path / "base", model, tensors)
    square = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_aspect_ratio="square"))
    _write(tmp_path / "run", square, {TOWER: torch.randn(3)}, base="../../base")
    reader = open_checkpoint(tmp_path / "run")
    assert reader.manifest.model == square
    assert torch.equal(reader.read(FC2), tensors[FC2])


def test_what_a_run_sets_changes_no_tensor() -> None:
    model = known_model("qwen2-0.5b+clip-l-336")
    assert model.denoiser is not None
    regress = dataclasses.replace(model, denoiser=dataclasses.replace(model.denoiser, objective="regress"))
    deeper = dataclasses.replace(model, denoiser=dataclasses.replace(model.denoiser, depth=8))
    assert regress != model
    assert regress.same_tensors == model.same_tensors != deeper.same_tensors


def test_truncated_and_missing_files_are_named(
    tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]
) -> None:
    data = _write(tmp_path, model, tensors) / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"__0_0.distcp is truncated"):
        open_checkpoint(tmp_path)
    data.unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp is missing"):
        open_checkpoint(tmp_path)
    (data.parent / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata is missing"):
        open_checkpoint(tmp_path)


def test_damaged_data_is_an_error_that_names_the_tensor(
    tmp_path: Path, model: RossModelConfig, tensors: dict[str, Tensor]
) -> None:
    data = _write(tmp_path, model, tensors) / "__0_0.distcp"
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(ValueError, match=f"cannot read {FC2}"):
        open_checkpoint(tmp_path).read(FC2)


class _Hostile:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_code_in_the_index_is_refused_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Hostile(trap)))
    with pytest.raises(ValueError, match="not a readable checkpoint index"):
        read_index(tmp_path)
    assert not trap.exists()


def test_index_that_leaves_its_folder_is_refused(tmp_path: Path, model: RossModelConfig) -> None:
    directory = _write(tmp_path / "a", model, {TOWER: torch.zeros(1)})
    index = read_index(directory)
    for info in index.storage_data.values():
        info.relative_path = "../../../secret"
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="outside of its folder"):
        open_checkpoint(tmp_path / "a")

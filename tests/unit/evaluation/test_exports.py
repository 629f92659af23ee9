"""From the name of a checkpoint to an exported folder, and which framework runs a task."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ross.checkpoint.manifest import Manifest, write_latest
from megatron_ross.evaluation.benchmarks import benchmarks, job
from megatron_ross.evaluation.errors import FrameworkError, framework_errors
from megatron_ross.evaluation.exports import exported_folder
from megatron_ross.evaluation.results import published
from tests.helpers import golden
from tests.helpers.variants import Stored, make_variant


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "llama_clip")


@pytest.fixture
def run(stored: Stored, tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    shutil.copytree(stored.path, tmp_path / "run" / "checkpoints" / stored.path.name)
    write_latest(tmp_path / "run" / "checkpoints", int(stored.path.name.removeprefix("iter_")))
    return tmp_path / "run"


def test_a_training_checkpoint_is_exported_once(run: Path, stored: Stored) -> None:
    name = stored.path.name
    first = exported_folder(str(run))
    assert first == (run / "checkpoints-exports" / f"{name}-ross").resolve()
    written = (first / "config.json").stat().st_mtime_ns
    for same in (run, run / "checkpoints", run / "checkpoints" / name, first):
        assert Path(exported_folder(str(same))).resolve() == first
    assert (first / "config.json").stat().st_mtime_ns == written
    assert exported_folder(str(run), "llava").name == f"{name}-llava"


def test_other_ranks_wait_for_the_export(run: Path) -> None:
    with pytest.raises(ValueError, match="did not appear within 0 s: the ranks must share this file system"):
        exported_folder(str(run), rank=1, wait_seconds=0)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(exported_folder, str(run), rank=1)
        assert exported_folder(str(run), rank=0) == waiting.result(timeout=60)


def test_an_export_of_another_checkpoint_is_replaced(run: Path) -> None:
    first = exported_folder(str(run))
    (manifest,) = run.rglob("manifest.json")
    replace(Manifest.read(manifest.parent), training={"again": 1}).write(manifest.parent)
    (first / "stale").touch()
    assert exported_folder(str(run)) == first
    assert not (first / "stale").exists()


def test_what_is_no_checkpoint(run: Path, stored: Stored, tmp_path: Path) -> None:
    assert exported_folder(str(golden.checkpoint_dir("llama_clip"))) == golden.checkpoint_dir("llama_clip")
    with pytest.raises(ValueError, match="is no run folder with checkpoints/"):
        exported_folder(str(tmp_path))
    with pytest.raises(ValueError, match="missing': no such folder"):
        exported_folder(str(tmp_path / "missing"))
    taken = run / "checkpoints-exports" / f"{stored.path.name}-ross"
    taken.mkdir(parents=True)
    with pytest.raises(ValueError, match="was not made by evaluation, or not completed: remove it"):
        exported_folder(str(run))


def test_tasks_and_frameworks() -> None:
    assert (job("pope").framework, job("pope").task.task) == ("vlmevalkit", "POPE")
    assert (job("mmvp").framework, job("gqa").framework) == ("builtin", "lmms-eval")
    assert job("docvqa", "vlmevalkit").task.task == "DocVQA_VAL"
    assert job("mme", "lmms-eval").task.task == "mme"
    with pytest.raises(ValueError, match="mmlu is not in vlmevalkit; --framework can be lmms-eval"):
        job("mmlu", "vlmevalkit")


def test_every_benchmark_is_published_with_a_framework_that_has_it() -> None:
    for benchmark in benchmarks().values():
        assert benchmark.published_with in benchmark.frameworks
        assert all(task.metric for task in benchmark.frameworks.values())
    assert {name for figures in published().values() for name in figures} <= set(benchmarks())


class RetryError(Exception):
    """Like tenacity's: the cause is inside."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("RetryError")
        self.last_attempt = type("Attempt", (), {"exception": lambda self: cause})()


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (KeyError("field"), r"x failed in t \(KeyError: 'field'\): the traceback in .*error.log says where"),
        (SystemExit(2), r"x failed in t \(SystemExit: 2\)"),
        (RetryError(ConnectionError("no network")), r"the data of t for x is missing \(ConnectionError: no network\)"),
        (FileNotFoundError("a.tsv"), "the data of t for x is missing"),
        (
            ModuleNotFoundError("No module named 'y'", name="y"),
            "x cannot import y .*: install what is missing, or the framework again: pip install x; traceback in",
        ),
        (ImportError("undefined symbol"), r"x cannot import one of its modules \(ImportError: undefined symbol\)"),
    ],
)
def test_crashes_become_one_line(raised: BaseException, message: str, tmp_path: Path) -> None:
    with pytest.raises(FrameworkError, match=message), framework_errors("x", "t", tmp_path, "pip install x"):
        raise raised
    assert type(raised).__name__ in (tmp_path / "error.log").read_text()


def test_the_document_lists_every_benchmark(repository: Path) -> None:
    """Its table says what benchmarks.yaml does."""
    lines = (repository / "docs" / "evaluation.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| `--tasks` |")))
    rows = [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines[start:]]
    listed = {row[0]: row[1:] for row in rows[2 : rows.index([])]}
    expected = {}
    for benchmark in benchmarks().values():
        lmms, kit = (benchmark.frameworks.get(name) for name in ("lmms-eval", "vlmevalkit"))
        expected[benchmark.name] = [benchmark.label, benchmark.published_with]
        expected[benchmark.name] += [lmms.task, lmms.downloads] if lmms else ["", ""]
        expected[benchmark.name] += [kit.task if kit else ""]
        assert kit is None or kit.downloads == f"{kit.task}.tsv"
    assert listed == expected

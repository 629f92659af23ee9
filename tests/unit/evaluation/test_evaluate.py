"""tools/evaluate.py with its built-in tasks: answers, scores and tables; what cannot work is said on one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ross.cli.evaluate import main as command
from megatron_ross.evaluation.builtin import mmvp, pope
from megatron_ross.evaluation.builtin import run as builtin
from megatron_ross.evaluation.builtin.run import MMVP_DECODING
from megatron_ross.evaluation.command_line import MMVP_DECODINGS, POPE_PROMPTS
from megatron_ross.evaluation.main import main
from tests.helpers import golden
from tests.helpers.evaluation_data import MMVP_ROWS, write_mmvp, write_pope
from tests.helpers.variants import make_variant, without_denoiser

CHECKPOINT = str(golden.checkpoint_dir("qwen2_siglip"))
IMAGES = str(golden.GOLDEN / "preprocess" / "images")


def run(tasks: str, output: Path, *extra: str, checkpoint: str = CHECKPOINT) -> int:
    where = ["--checkpoint", checkpoint, "--tasks", tasks, "--output", str(output), "--device", "cpu"]
    return main([*where, *extra])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which must be the message."""
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_built_in_tasks_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, images = write_pope(tmp_path / "pope")
    data = ["--mmvp-data", str(write_mmvp(tmp_path / "mmvp", MMVP_ROWS)), "--pope-data", str(file)]
    steps = ["--reconstruction-images", IMAGES, "--reconstruction-steps", "2"]
    output = tmp_path / "results"
    tasks = "mmvp, pope, reconstruction"
    extra = [*data, "--pope-images", str(images), *steps, "--limit", "2", "--framework", "builtin"]
    assert run(tasks, output, *extra) == 0
    summary = json.loads((output / "results.json").read_text())
    found = {entry["benchmark"]: entry for entry in summary["results"]}
    rows = {
        name: [json.loads(line) for line in (output / "samples" / "builtin" / f"{name}.jsonl").read_text().splitlines()]
        for name in found
    }
    assert {name: len(lines) for name, lines in rows.items()} == {"mmvp": 2, "pope": 2, "reconstruction": 2}
    assert found["mmvp"]["scores"] == mmvp.mmvp_scores([row["correct"] for row in rows["mmvp"]])
    assert found["mmvp"]["percent"] == found["mmvp"]["scores"]["pair_accuracy"]
    expected = pope.yes_no_scores([r["said_yes"] for r in rows["pope"]], [r["label"] for r in rows["pope"]])
    assert found["pope"]["scores"] == expected
    assert 0 < found["reconstruction"]["percent"] < 100
    table = (output / "results.md").read_text()
    assert "| MMVP | builtin | pair_accuracy |" in table
    assert "| POPE | builtin * | f1 |" in table
    assert "Only the first questions were asked: MMVP 2, POPE 2, Reconstruction PSNR (dB) 2." in table
    assert "pair_accuracy" in capsys.readouterr().out


def test_several_calls_add_to_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one checkpoint and preset; anything else is refused before a question is asked."""
    file, images = write_pope(tmp_path / "pope")
    mmvp_data = ["--mmvp-data", str(write_mmvp(tmp_path / "mmvp", MMVP_ROWS))]
    pope_data = ["--framework", "builtin", "--pope-data", str(file), "--pope-images", str(images)]
    output = tmp_path / "results"
    assert run("mmvp", output, *mmvp_data, "--limit", "2") == 0
    assert run("pope", output, *pope_data) == 0
    table = (output / "results.md").read_text()
    assert "| MMVP | builtin |" in table
    assert "| POPE | builtin * |" in table
    assert "Only the first questions were asked: MMVP 2." in table
    assert run("mmvp", output, *mmvp_data) == 0
    written = (output / "results.json").read_text()
    assert [(e["benchmark"], e["settings"]["limit"]) for e in json.loads(written)["results"]] == [
        ("mmvp", None),
        ("pope", None),
    ]

    capsys.readouterr()
    other = str(golden.checkpoint_dir("llama_clip"))
    for words in ({"checkpoint": other}, {}):
        assert run("mmvp", output, *mmvp_data, *([] if words else ["--preset", "published"]), **words) == 1
        assert "name another folder with --output" in error(capsys)
    assert (output / "results.json").read_text() == written


def test_sampling_is_the_published_preset_and_repeatable(tmp_path: Path) -> None:
    data = str(write_mmvp(tmp_path / "mmvp", MMVP_ROWS))
    answers = []
    for name, extra in (
        ("greedy", []),
        ("a", ["--preset", "published", "--dtype", "fp32"]),
        ("b", ["--decoding", "published"]),
        ("c", ["--decoding", "published", "--seed", "1"]),
    ):
        assert run("mmvp", tmp_path / name, "--mmvp-data", data, *extra) == 0
        lines = (tmp_path / name / "samples" / "builtin" / "mmvp.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["answer"] for line in lines])
    greedy, preset, asked, other_seed = answers
    assert greedy != preset == asked != other_seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mmvpp"], "task 'mmvpp' is unknown: did you mean mmvp?"),
        ([","], "--tasks names no task"),
        (["gqa", "--framework", "builtin"], "gqa is not in builtin; --framework can be lmms-eval or vlmevalkit"),
        (["mmvp"], "the built-in mmvp needs --mmvp-data"),
        (["pope", "--framework", "builtin", "--pope-data", "x"], "the built-in pope needs --pope-images"),
        (["mmvp", "--mmvp-data", "no"], "Questions.csv is missing: --mmvp-data must name"),
        (["mmvp", "--mmvp-data", "no", "--batch-size", "0"], "batch-size is 0"),
        (["mmvp", "--mmvp-data", "no", "--limit", "0"], "limit is 0"),
        (["pope", "--limit", "3"], "VLMEvalKit"),
    ],
)
def test_what_cannot_work_ends_with_status_1(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, *extra = arguments
    assert run(tasks, tmp_path / "results", *extra) == 1
    assert message in error(capsys)
    assert not (tmp_path / "results").exists()


def test_frameworks_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in ("lmms_eval", "vlmeval") else find(n, *a)
    )
    assert run("gqa", tmp_path / "results") == 1
    assert "lmms-eval is not installed: pip install" in error(capsys)
    assert run("seed", tmp_path / "results") == 1
    assert "VLMEvalKit is not installed: git clone" in error(capsys)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both frameworks can be found, and import a module that is not there."""
    for name in ("lmms_eval/evaluator.py", "vlmeval/config.py"):
        package = (tmp_path / "broken" / name).parent
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (tmp_path / "broken" / name).write_text("import left_out_by_mistake\n")
    (tmp_path / "broken" / "run.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "broken")
    for name in [n for n in sys.modules if n.partition(".")[0] in ("lmms_eval", "vlmeval")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] in ("lmms_eval", "vlmeval")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("task", "framework", "install"),
    [("gqa", "lmms-eval", "pip install --no-deps lmms_eval"), ("seed", "vlmevalkit", "pip install -e VLMEvalKit")],
)
def test_frameworks_that_are_not_installed_completely(
    task: str, framework: str, install: str, broken: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    assert run(task, output) == 1
    message = error(capsys)
    assert f"{framework} cannot import left_out_by_mistake (ModuleNotFoundError: No module named" in message
    assert install in message
    assert not (output / "results.json").exists()


def test_built_in_tasks_refuse_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("mmvp", tmp_path / "results", "--mmvp-data", "no") == 1
    assert "leave out torchrun" in error(capsys)


def test_a_checkpoint_without_denoiser_cannot_reconstruct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = make_variant(tmp_path, "llama_clip", without_denoiser)
    extra = ["--reconstruction-images", IMAGES]
    assert run("reconstruction", tmp_path / "results", *extra, checkpoint=str(stored.composite)) == 1
    assert "the checkpoint has no denoiser" in error(capsys)


@pytest.fixture
def both(tmp_path: Path) -> list[str]:
    """Arguments for the built-in mmvp and pope."""
    file, images = write_pope(tmp_path / "pope")
    mmvp_folder = write_mmvp(tmp_path / "mmvp", MMVP_ROWS)
    where = ["--mmvp-data", str(mmvp_folder), "--pope-data", str(file), "--pope-images", str(images)]
    return [*where, "--framework", "builtin"]


def test_a_benchmark_that_crashes_costs_only_itself(
    both: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it raises; the repeated command asks for it alone."""
    output, asked = tmp_path / "results", []
    run_task = builtin.run_task

    def crash(task: str, *args: object) -> builtin.BuiltinResult:
        asked.append(task)
        if task == "pope" and asked.count("pope") == 1:
            raise RuntimeError("CUDA out of memory")
        return run_task(task, *args)

    monkeypatch.setattr(builtin, "run_task", crash)
    assert run("pope,mmvp", output, *both) == 1
    message = error(capsys)
    assert "builtin failed in pope (RuntimeError: CUDA out of memory)" in message
    assert "missing: pope; the same command asks for nothing else again" in message
    assert [e["benchmark"] for e in json.loads((output / "results.json").read_text())["results"]] == ["mmvp"]
    assert "| MMVP | builtin |" in (output / "results.md").read_text()
    assert "No score: builtin pope: " in (output / "results.md").read_text()
    assert "CUDA out of memory" in (output / "error.log").read_text()

    assert run("pope,mmvp", output, *both) == 0
    assert asked == ["pope", "mmvp", "pope"]
    assert "mmvp (builtin): taken up from" in capsys.readouterr().out
    assert {e["benchmark"] for e in json.loads((output / "results.json").read_text())["results"]} == {"mmvp", "pope"}
    assert "No score" not in (output / "results.md").read_text()
    assert not (output / "missing.json").exists()
    assert run("pope,mmvp", output, *both, "--reuse", "false", "--limit", "2") == 0
    assert asked[3:] == ["pope", "mmvp"]


def test_a_process_that_ends_in_a_benchmark_keeps_the_others_and_asks_for_it_last(
    both: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, asked = tmp_path / "results", []
    run_task = builtin.run_task

    def killed(task: str, *args: object) -> builtin.BuiltinResult:
        asked.append(task)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return run_task(task, *args)

    monkeypatch.setattr(builtin, "run_task", killed)
    with pytest.raises(KeyboardInterrupt):
        run("mmvp,pope", output, *both)
    assert [e["benchmark"] for e in json.loads((output / "results.json").read_text())["results"]] == ["mmvp"]
    assert json.loads((output / "missing.json").read_text()) == {
        "builtin pope": "it was being asked when the process ended"
    }
    assert run("pope,mmvp", output, *both, "--limit", "2") == 0  # another limit: both are asked again
    assert asked == ["mmvp", "pope", "mmvp", "pope"]


def test_choices_on_the_command_line_are_those_of_the_tasks() -> None:
    """The command line imports no task."""
    assert tuple(MMVP_DECODING) == MMVP_DECODINGS
    assert tuple(pope.PROMPTS) == POPE_PROMPTS


def test_the_tool_starts_it(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("evaluate_tool", repository / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main is command
    assert sys.exit is module.sys.exit

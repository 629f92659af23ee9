"""All commands: `--help` and refusals come at once, without torch and without a library's warning."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ross.cli.main import COMMANDS, main
from tests.helpers.sources import ROOT

HEAVY = ("torch", "transformers", "megatron", "numpy", "matplotlib", "diffusers", "huggingface_hub")
CPU_SECONDS = 2.0
REFUSED = "--no-such-flag"
WITHOUT_ARGUMENTS = {"recipe_table.py", "settings_page.py"}
DOORS = ["pretrain_ross.py"] + [
    f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py")) if path.name not in WITHOUT_ARGUMENTS
]

# Runs every command in one process that never had torch, and says what each one printed and took.
SCRIPT = """
import contextlib, io, json, sys, time
from megatron_ross.cli.main import COMMANDS, main
import megatron_ross.training.main as training
training._leave = lambda code, rank, message, **more: print(message, file=sys.stderr) or code
rows, arguments = [], sys.argv[1:]
for command in COMMANDS:
    for argument in arguments:
        out, err = io.StringIO(), io.StringIO()
        begin = time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                sys.argv[1:] = [command, argument, *(["3"] if argument != "--help" else [])]
                code = main()
            except SystemExit as left:
                code = left.code
        loaded = [name for name in HEAVY if name in sys.modules]
        rows.append([command, argument, code, out.getvalue(), err.getvalue(), time.process_time() - begin, loaded])
print(json.dumps(rows))
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


def python(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], list]:
    done = python("-c", f"HEAVY = {HEAVY!r}\n{SCRIPT}", "--help", REFUSED)
    assert done.returncode == 0, done.stderr
    return {(row[0], row[1]): row[2:] for row in json.loads(done.stdout)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_at_once(answers: dict, command: str) -> None:
    code, out, err, seconds, loaded = answers[command, "--help"]
    assert (code or 0, err, loaded) == (0, "", [])
    assert f"usage: megatron-ross {command}" in out
    assert seconds < CPU_SECONDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_is_refused_at_once_in_one_line(answers: dict, command: str) -> None:
    code, out, err, seconds, loaded = answers[command, REFUSED]
    assert (code, out, loaded) == (1, "", [])
    assert err == "error: no_such_flag: no such setting; --help lists them all\n"
    assert seconds < CPU_SECONDS


def test_the_check_sees_an_import() -> None:
    """Of one heavy module, by a command that is allowed to: the row says so."""
    code = f"HEAVY = {HEAVY!r}\nimport numpy\n{SCRIPT}"
    rows = json.loads(python("-c", code, "--help").stdout)
    assert all(row[-1] == ["numpy"] for row in rows)


@pytest.mark.parametrize("door", DOORS)
def test_doors_answer_at_once(door: str) -> None:
    """The scripts of the repository, in a process each: CPU time, because wall time is the machine's load."""
    for words, code in ((["--help"], 0), ([REFUSED, "3"], 1)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(door, *words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == code
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS


def test_the_program_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert main([]) == 1
    assert capsys.readouterr().err.startswith("error: name a command: train, import, export")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("trian", "trian: no such command; did you mean train?"),
        ("prepare_dat", "prepare_dat: no such command; did you mean prepare-data?"),
        ("zzz", "zzz: no such command; use train, import"),
    ],
)
def test_unknown_commands(name: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 1
    assert capsys.readouterr().err.startswith(f"error: {answer}")


def test_underscores_name_commands_too() -> None:
    done = python("-m", "megatron_ross.cli", "cache_latents", "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_training_on_ranks_starts_through_the_module(tmp_path: Path) -> None:
    """As docs say: `torchrun -m megatron_ross.cli train`. A refusal by all ranks is one line of the first."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(*torchrun, "-m", "megatron_ross.cli", "train", "--num-layers", "3")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "num_layers" in line]
    assert lines[0] == "error: num_layers: no such setting; the checkpoint defines the model (init_from, or load)"


GOLDEN = ROOT / "tests" / "golden"
ROSS, LLM, TOWER, VAE = (str(GOLDEN / name) for name in ("ross_qwen2_siglip", "llm_qwen2", "vision_siglip", "vae"))
GENERATE = ["generate", "--checkpoint", ROSS, "--question", "What?"]
RECONSTRUCT = ["reconstruct", "--checkpoint", ROSS, "--output", "painted", "--images"]
ANSWER = ["answer-questions", "--checkpoint", ROSS, "--images", ".", "--output", "a.json", "--questions"]
IMAGES = str(GOLDEN / "preprocess" / "images")
COMPONENTS = ["import", "--output", "imported", "--llm", LLM, "--vision-tower"]
WRONG_VALUES: dict[str, list[str]] = {
    "dtype: invalid choice: 'fp33'": [*GENERATE, "--dtype", "fp33"],
    "template: invalid choice: 'qwen2'": [*GENERATE, "--template", "qwen2"],
    "temperature is -1.0": [*GENERATE, "--temperature", "-1"],
    "image='no.jpg': no such file": [*GENERATE, "--image", "no.jpg"],
    "device='cud': write cpu, cuda": [*GENERATE, "--device", "cud"],
    "no is not a folder of images": [*RECONSTRUCT, "no"],
    "batch_size=0: must be at least 1": [*RECONSTRUCT, IMAGES, "--batch-size", "0"],
    "limit=-3: must be at least 1": [*RECONSTRUCT, IMAGES, "--limit", "-3"],
    "respacing '0' is not": [*RECONSTRUCT, IMAGES, "--steps", "0"],
    "questions=no.json: no such file": [*ANSWER, "no.json"],
    "task 'gqaa' is unknown": ["evaluate", "--checkpoint", ROSS, "--tasks", "gqaa"],
    "limit=0: must be at least 1": ["evaluate", "--checkpoint", ROSS, "--tasks", "gqa", "--limit", "0"],
    "golden already exists": ["import", "--checkpoint", ROSS, "--output", str(GOLDEN)],
    "golden already exists: give": ["export", "--checkpoint", "runs/x", "--output", str(GOLDEN)],
    "give --checkpoint, or both": ["import", "--output", "imported", "--llm", LLM],
    "is an auto-encoder alone; give it as --vae": [*COMPONENTS, VAE],
    "is a language model alone (model_type 'qwen2'); give it as --llm": [*COMPONENTS, LLM],
    "is a vision tower alone; give it as --vision-tower": [*COMPONENTS, TOWER, "--vae", TOWER],
}
"""Words of the refusal -> command line; all of these stopped only after seconds of imports, or after the weights."""

REFUSALS = """
import contextlib, io, json, sys
from megatron_ross.cli.main import main
rows = []
for words in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(words)
    rows.append([code, err.getvalue(), [name for name in HEAVY if name in sys.modules]])
print(json.dumps(rows))
"""


FOREIGN: dict[str, tuple[str, dict]] = {
    "quantization_config (method 'awq')": (
        "quantised",
        {"model_type": "ross_qwen2", "quantization_config": {"quant_method": "awq"}},
    ),
    "(model_type 'llava_next')": ("llava-1.6", {"model_type": "llava_next"}),
    "is a LoRA adapter of 'v/7b'": ("lora", {"mm_vision_tower": "openai/clip", "model_type": "llava_llama"}),
}
"""Words of the refusal -> a whole model of 7 GB that nobody here reads, and its config."""


@pytest.mark.parametrize("command", ["generate", "reconstruct", "evaluate", "import"])
def test_models_that_cannot_be_read_are_named_before_anything_large_is_imported(command: str, tmp_path: Path) -> None:
    lines = []
    for name, config in FOREIGN.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        if name == "lora":
            (tmp_path / name / "adapter_config.json").write_text('{"base_model_name_or_path": "v/7b"}')
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(7 << 30)
        own = {"reconstruct": ["--images", IMAGES], "evaluate": ["--tasks", "gqa"]}.get(command, [])
        out = [] if command == "generate" else ["--output", str(tmp_path / "out")]
        lines.append([command, "--checkpoint", str(tmp_path / name), *own, *out])
    done = python("-c", f"HEAVY = {HEAVY!r}\n{REFUSALS}", json.dumps(lines), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for message, (status, err, loaded) in zip(FOREIGN, json.loads(done.stdout), strict=True):
        assert (status, loaded, err.count("\n")) == (1, [], 1), (message, err)
        assert message in err
    assert not (tmp_path / "out").exists()


def test_wrong_values_are_refused_before_anything_large_is_imported(tmp_path: Path) -> None:
    code = f"HEAVY = {HEAVY!r}\n{REFUSALS}"
    done = python("-c", code, json.dumps(list(WRONG_VALUES.values())), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for message, (status, err, loaded) in zip(WRONG_VALUES, json.loads(done.stdout), strict=True):
        assert (status, loaded, err.count("\n")) == (1, [], 1), (message, err)
        assert message in err
    assert not list(tmp_path.iterdir())

"""A tiny exported checkpoint through lmms-eval, offline: every supported output type, both interfaces, two ranks."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.evaluation.generate import load_for_inference, open_image
from megatron_ross.evaluation.main import main
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.prompts import user_turn
from tests.evaluation.conftest import SHORT, Local
from tests.helpers.sources import ROOT
from tests.helpers.variants import Stored

pytestmark = pytest.mark.eval


@functools.cache
def simple(folder: Path, batch_size: int = 3, settings: str = "default", dtype: str = "fp32") -> Any:
    from megatron_ross.evaluation.lmms_eval.simple import MegatronRoss

    return MegatronRoss(str(folder), batch_size=batch_size, device="cpu", settings=settings, dtype=dtype)


@functools.cache
def manager(folder: Path) -> Any:
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=str(folder), include_defaults=False)


def evaluate(lm: Any, local: Local, *tasks: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """lmms-eval's scores and logged samples of tasks."""
    from lmms_eval.evaluator import simple_evaluate

    found = simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager(local.folder), batch_size=1, bootstrap_iters=0
    )
    return found["results"], found["samples"]


def responses(samples: list[dict[str, Any]]) -> list[Any]:
    """Answers in the order of the records."""
    return [sample["filtered_resps"][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def test_answers_are_those_of_generate(exported: Path, local: Local) -> None:
    """tools/generate.py and lmms-eval give one answer to one prompt; three of four answers are the expected ones."""
    scores, samples = evaluate(simple(exported), local, "toy_generate")
    assert responses(samples["toy_generate"]) == local.answers
    assert scores["toy_generate"]["right,none"] == 0.75


def test_chat_interface_agrees(exported: Path, local: Local) -> None:
    from megatron_ross.evaluation.lmms_eval.chat import MegatronRossChat

    lm = MegatronRossChat(str(exported), batch_size=2, device="cpu")
    scores, samples = evaluate(lm, local, "toy_generate", "toy_rounds")
    assert responses(samples["toy_generate"]) == local.answers
    assert scores["toy_generate"]["right,none"] == 0.75
    assert scores["toy_rounds"]["num_answers,none"] == 2


def test_text_alone_and_several_rounds(exported: Path, local: Local) -> None:
    lm = simple(exported)
    scores, samples = evaluate(lm, local, "toy_text", "toy_rounds")
    decoding = Decoding(max_new_tokens=6)
    alone = [lm.chat.answer([[user_turn(r["question"] + SHORT)]], decoding)[0] for r in local.records]
    assert responses(samples["toy_text"]) == alone
    assert scores["toy_rounds"]["num_answers,none"] == 2
    assert all(len(answers) == 2 for answers in responses(samples["toy_rounds"]))


@functools.cache
def losses_by_hand(composite: Path, records: str, shown: bool) -> list[list[float]]:
    """Mean negative log-likelihood of every candidate and its end token, from one forward pass each."""
    model, processor = load_for_inference(str(composite), device="cpu")
    system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )
    found = []
    for record in json.loads(records):
        marker = "<image>\n" if shown else ""
        prompt = processor.encode(f"{system} USER: {marker}{record['question']} ASSISTANT:")
        pixels = processor.pixels([open_image(record["image"])]) if shown else None
        losses = []
        for candidate in record["candidates"]:
            answer = processor.tokenizer(f" {candidate}<|im_end|>").input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer]), pixel_values=pixels).logits[0]
            log_probabilities = logits.double().log_softmax(-1)
            terms = [-float(log_probabilities[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
            losses.append(sum(terms) / len(terms))
        found.append(losses)
    return found


@pytest.mark.parametrize("task", ["toy_choice", "toy_text_choice"])
def test_candidates_have_hand_computed_losses(task: str, exported: Path, stored: Stored, local: Local) -> None:
    scores, samples = evaluate(simple(exported), local, task)
    expected = losses_by_hand(stored.composite, json.dumps(local.records), task == "toy_choice")
    logged = sorted(samples[task], key=lambda sample: sample["doc_id"])
    for sample, losses in zip(logged, expected, strict=True):
        assert [loss for loss, _ in sample["filtered_resps"]] == pytest.approx(losses, abs=2e-5)
    right = [losses.index(min(losses)) == 0 for losses in expected]
    assert 0 < sum(right) < 4
    assert scores[task]["acc,none"] == sum(right) / 4


def test_likelihood_of_one_text(exported: Path, stored: Stored, local: Local) -> None:
    """The text is a function of the record, not a string."""
    scores, _ = evaluate(simple(exported), local, "toy_likelihood")
    expected = [losses[0] for losses in losses_by_hand(stored.composite, json.dumps(local.records), True)]
    assert scores["toy_likelihood"]["loss,none"] == pytest.approx(sum(expected) / 4, abs=2e-5)


def test_published_candidates_keep_the_blank_of_the_task(exported: Path, local: Local) -> None:
    default, published = simple(exported).chat, simple(exported, settings="published").chat
    question = [user_turn("Which colour?")]
    assert default.score([question], [" red"]) == default.score([question], ["red"])
    assert published.score([question], ["red"])[0][0] == pytest.approx(
        default.score([question], ["red"])[0][0], abs=1e-6
    )
    assert published.score([question], [" red"])[0][0] != default.score([question], ["red"])[0][0]


def test_the_entry_point_is_found() -> None:
    from lmms_eval.models import get_model

    from megatron_ross.evaluation.lmms_eval.chat import MegatronRossChat
    from megatron_ross.evaluation.lmms_eval.simple import MegatronRoss

    assert get_model("megatron_ross") is MegatronRossChat
    assert get_model("megatron_ross", True) is MegatronRoss


def command(run: Path, local: Local, output: Path, tasks: str) -> list[str]:
    words = ["--checkpoint", str(run), "--framework", "lmms-eval", "--tasks", tasks, "--batch-size", "2"]
    return [*words, "--include-path", str(local.folder), "--output", str(output), "--device", "cpu"]


def write_textvqa(folder: Path, local: Local) -> None:
    """lmms-eval's own TextVQA with the local pictures."""
    built_in = Path(find_spec("lmms_eval").origin).parent / "tasks" / "textvqa" / "textvqa_val.yaml"
    data = folder / "textvqa.jsonl"
    more = [
        {"question_id": i, "ocr_tokens": ["stop", str(i)], "answers": ["stop"] * 10}
        for i, _ in enumerate(local.records)
    ]
    data.write_text("".join(json.dumps(r | m) + "\n" for r, m in zip(local.records, more, strict=True)))
    (folder / "utils.py").write_text((local.folder / "utils.py").read_text())
    (folder / "textvqa_val.yaml").write_text(
        f"include: {built_in}\ntask: textvqa_val\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {data}}}}}\ndoc_to_visual: !function utils.pictures\n"
        "generation_kwargs: {max_new_tokens: 6}\n"
    )


@pytest.mark.parametrize("settings", ["default", "published"])
def test_textvqa_shows_ocr_tokens_as_published(settings: str, stored: Stored, local: Local, tmp_path: Path) -> None:
    """The override of the built-in task reaches its prompts, and the model answers those."""
    write_textvqa(tmp_path, local)
    words = command(stored.composite, replace(local, folder=tmp_path), tmp_path / "results", "textvqa")
    assert main([*words, "--preset", settings, "--dtype", "fp32"]) == 0
    chat = simple(stored.composite, settings=settings).chat
    expected = []
    for i, record in enumerate(local.records):
        shown = f"\nReference OCR token: stop, {i}" if settings == "published" else ""
        asked = user_turn(record["question"].capitalize() + shown + SHORT, [open_image(record["image"])])
        expected += chat.answer([[asked]], Decoding(6))
    rows = [json.loads(line) for line in (tmp_path / "results/samples/lmms-eval/textvqa_val.jsonl").open()]
    assert responses(rows) == expected
    (entry,) = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert (entry["metric"], entry["as_published"]) == ("exact_match", False)  # fp32, and tasks of the test's own


def test_torchvision_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from megatron_ross.evaluation.lmms_eval.simple import MegatronRoss\n"
        "from megatron_ross.evaluation.lmms_eval.chat import MegatronRossChat\n"
        "from lmms_eval.evaluator import simple_evaluate\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_command_from_a_training_checkpoint_on_one_and_two_ranks(
    stored: Stored, local: Local, tmp_path: Path
) -> None:
    """The Megatron checkpoint is exported once, and both runs find the same scores and answers."""
    root, tasks = stored.path.parent, "toy_generate,toy_choice"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "ACCELERATE_USE_CPU": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for launcher, name in ((torchrun, "two"), ([], "one")):
        words = [sys.executable, *launcher, str(ROOT / "tools" / "evaluate.py")]
        words += command(root, local, tmp_path / name, tasks)
        done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        summary = json.loads((tmp_path / name / "results.json").read_text())
        found.append({entry["task"]: entry["scores"] for entry in summary["results"]})
        answers = [
            json.loads(line) for line in (tmp_path / name / "samples" / "lmms-eval" / "toy_generate.jsonl").open()
        ]
        assert sorted(row["filtered_resps"][0] for row in answers) == sorted(local.answers)
    assert found[0] == found[1]
    assert found[0]["toy_generate"]["right"] == 0.75
    exports = root.parent / f"{root.name}-exports"
    assert [path.name for path in exports.iterdir()] == [f"{stored.path.name}-ross"]
    assert "wrote" not in done.stdout, "the second run exported again"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("toy_generat", "lmms-eval has no task 'toy_generat': did you mean toy_generate"),
        ("toy_crash", "lmms-eval failed in toy_crash (KeyError: 'no such field in the record')"),
        ("toy_missing", "the data of toy_missing for lmms-eval is missing"),
        ("gqa", "the data of gqa for lmms-eval is missing"),
    ],
)
def test_failures_end_with_status_1_and_one_line(
    task: str,
    message: str,
    stored: Stored,
    local: Local,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """lmms-eval's own command line would end with status 0."""
    assert main(command(stored.composite, local, tmp_path / "results", task)) == 1
    lines = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert not (tmp_path / "results" / "results.json").exists()


def test_a_task_that_crashes_costs_only_itself_on_one_and_two_ranks(
    stored: Stored, local: Local, tmp_path: Path
) -> None:
    """With two, toy_crash fails on both, and toy_missing on the first while the second waits
    for it: the call ends, and the same command asks for what is left, with the tasks that failed last."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "ACCELERATE_USE_CPU": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, name, calls in ((torchrun, "two", 2), ([], "one", 1)):
        words = [sys.executable, *launcher, str(ROOT / "tools" / "evaluate.py")]
        words += command(stored.composite, local, tmp_path / name, "toy_crash,toy_missing,toy_generate")
        for _ in range(calls):
            done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
            assert done.returncode == 1
            assert "missing: toy_crash, toy_missing" in done.stderr
        (entry,) = json.loads((tmp_path / name / "results.json").read_text())["results"]
        assert (entry["task"], entry["metric"], entry["percent"]) == ("toy_generate", "right", 0.75)
        table = (tmp_path / name / "results.md").read_text()
        assert "| toy_generate | lmms-eval | right | 0.8 |" in table
        assert "No score: lmms-eval toy_crash: lmms-eval failed in toy_crash (KeyError: " in table

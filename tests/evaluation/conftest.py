"""A tiny exported checkpoint, and local tasks that expect what the model says, but for one question."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_DATASETS_OFFLINE"] = "1"

from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.evaluation.generate import ChatSession, load_for_inference, open_image
from megatron_ross.evaluation.options import Decoding
from megatron_ross.huggingface.chat_templates import chat_template
from tests.helpers import golden
from tests.helpers.variants import Stored, make_variant

MAX_NEW_TOKENS = 6
SHORT = "\nAnswer the question using a single word or phrase."
PICTURES = ("square.png", "landscape.png", "portrait.jpg", "rgba.png")
QUESTIONS = ("What is it?", "Is there a cat in the image, or is there none at all?", "Which colour?", "How many?")
CANDIDATES = (["a cat", "a dog"], ["yes", "no"], ["red", "green", "blue"], ["one", "two"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `eval` where lmms-eval is not installed."""
    if find_spec("lmms_eval") is None:
        for item in items:
            if item.get_closest_marker("eval"):
                item.add_marker(pytest.mark.skip(reason="needs lmms-eval: make test-eval"))


@dataclass(frozen=True)
class Local:
    """Folder of the tasks, their records, and the model's answers to them."""

    folder: Path
    records: list[dict[str, Any]]
    answers: list[str]


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The golden Qwen2 model as Megatron checkpoint, in the place of a run folder's checkpoints."""
    return make_variant(tmp_path_factory.mktemp("run"), "qwen2_siglip")


@pytest.fixture(scope="session", params=["ross", "llava"])
def exported(request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both exported formats of it."""
    output = tmp_path_factory.mktemp("exported") / request.param
    export_checkpoint(stored.path, output, request.param, templates=chat_template)
    return output


@pytest.fixture(scope="session")
def local(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Local:
    """Tasks of every supported output type with four records each."""
    folder = tmp_path_factory.mktemp("tasks")
    model, processor = load_for_inference(str(stored.composite), device="cpu")
    records, answers = [], []
    for number, (picture, question, candidates) in enumerate(zip(PICTURES, QUESTIONS, CANDIDATES, strict=True)):
        path = golden.GOLDEN / "preprocess" / "images" / picture
        session = ChatSession(model, processor, Decoding(MAX_NEW_TOKENS))
        answers.append(session.ask(question + SHORT, [open_image(path)]))
        expected = "another answer" if number == 3 else answers[-1]
        records.append(
            {"image": str(path), "question": question, "answer": expected, "candidates": candidates, "label": 0}
        )
    write_tasks(folder, records)
    return Local(folder, records, answers)


def write_tasks(folder: Path, records: list[dict[str, Any]]) -> None:
    """Records as JSON lines, and one definition for each output type."""
    data = folder / "records.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    functions = Path(__file__).parent / "tasks" / "utils.py"
    (folder / "utils.py").write_text(functions.read_text(encoding="utf-8"), encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    wording = json.dumps({"default": {"pre_prompt": "", "post_prompt": SHORT}})
    generate = (
        "output_type: generate_until\ndoc_to_text: !function utils.question\ndoc_to_target: answer\n"
        f"lmms_eval_specific_kwargs: {wording}\n"
        f"generation_kwargs: {{max_new_tokens: {MAX_NEW_TOKENS}, temperature: 0, do_sample: false}}\n"
        "metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]\n"
    )
    shown = "doc_to_visual: !function utils.pictures\n"
    scored = (
        "doc_to_text: !function utils.plain_question\ndoc_to_choice: !function utils.candidates\n"
        "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tasks = {
        "toy_generate": generate + shown + "process_results: !function utils.exact\n",
        "toy_text": generate + "process_results: !function utils.exact\n",
        "toy_crash": generate + shown + "process_results: !function utils.crash\n",
        "toy_choice": "output_type: multiple_choice\n" + shown + scored,
        "toy_text_choice": "output_type: multiple_choice\n" + scored,
        "toy_likelihood": "output_type: loglikelihood\ndoc_to_text: !function utils.plain_question\n"
        "doc_to_target: !function utils.first_candidate\nprocess_results: !function utils.loss\n"
        "metric_list: [{metric: loss, aggregation: mean, higher_is_better: false}]\n" + shown,
        "toy_rounds": generate.replace("generate_until", "generate_until_multi_round")
        .replace("utils.question", "utils.rounds")
        .replace("right", "num_answers")
        + shown
        + "process_results: !function utils.last_round\n",
    }
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}", encoding="utf-8")
    missing = common.replace(str(data), str(folder / "missing.jsonl"))
    (folder / "toy_missing.yaml").write_text(f"task: toy_missing\n{missing}{tasks['toy_generate']}", encoding="utf-8")


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, so that nothing of an earlier run is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield

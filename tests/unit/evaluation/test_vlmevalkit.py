"""The VLMEvalKit adapter and launcher with a stand-in for `vlmeval`; tests/evaluation has the real one."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.generate import open_image
from megatron_ross.evaluation.main import main
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.presets import preset
from megatron_ross.evaluation.prompts import user_turn
from megatron_ross.evaluation.vlmevalkit import adapter
from megatron_ross.evaluation.vlmevalkit.launcher import find_run_py, register
from megatron_ross.evaluation.vlmevalkit.run import read_scores
from tests.helpers import golden

PICTURE = golden.GOLDEN / "preprocess" / "images" / "landscape.png"
CHECKPOINT = str(golden.checkpoint_dir("llama_clip"))

# A small VLMEvalKit. As the real one's, its run.py swallows errors, ends with status 0, scores on rank 0 only, and
# answers in a new folder each time, where it takes up the newest answers only if it is asked to.
FAKE = {
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {}\n",
    "vlmeval/dataset/__init__.py": """
KINDS = {"AI2D_TEST": "MCQ", "HallusionBench": "Y/N", "POPE": "Y/N", "OCRBench": "VQA"}
def DATASET_TYPE(dataset, default="MCQ"):
    return KINDS.get(dataset, default)
""",
    "vlmeval/vlm/__init__.py": "",
    "vlmeval/vlm/base.py": """
class BaseModel:
    def __init__(self):
        self.dump_image_func = None
    def dump_image(self, line, dataset):
        return self.dump_image_func(line)
""",
    "run.py": """
import argparse, json, os, pathlib
from vlmeval.config import supported_VLM
parser = argparse.ArgumentParser()
parser.add_argument("--data", nargs="+")
parser.add_argument("--model", nargs="+")
parser.add_argument("--judge")
parser.add_argument("--work-dir")
parser.add_argument("--reuse", action="store_true")
parser.add_argument("--reuse-aux")
args = parser.parse_args()
assert args.judge == "exact_matching"
model = supported_VLM[args.model[0]]()
model.dump_image_func = lambda line: [line["image"]]
for name in args.data:
    try:
        root = pathlib.Path(args.work_dir) / args.model[0]
        folder = root / f"T{len(list(root.glob('T*')))}"
        answered = f"{args.model[0]}_{name}.json"
        earlier = sorted(root.glob(f"T*/{answered}"))
        folder.mkdir(parents=True, exist_ok=True)
        line = {"image": PICTURE, "question": "Is it?", "A": "yes", "B": "no"}
        if model.use_custom_prompt(name):
            message = model.build_prompt(line, name)
        else:
            message = [{"type": "image", "value": PICTURE}, {"type": "text", "value": "Is it?"}]
        if earlier and args.reuse:
            (folder / answered).write_text(earlier[-1].read_text())
        else:
            (folder / answered).write_text(json.dumps([message, model.generate_inner(message, dataset=name)]))
        if name == "POPE":
            raise KeyError("category")
        if os.environ.get("RANK", "0") == "0":
            (folder / f"{args.model[0]}_{name}_acc.csv").write_text('"split","Overall"\\n"none","0.25"\\n')
    except Exception as error:
        print("failed:", error)
""",
}


@pytest.fixture
def vlmeval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Source folder of the stand-in, which can be imported."""
    for name, text in FAKE.items():
        path = tmp_path / "VLMEvalKit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("PICTURE", repr(str(PICTURE))))
    monkeypatch.syspath_prepend(tmp_path / "VLMEvalKit")
    for name in [n for n in sys.modules if n.partition(".")[0] == "vlmeval"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    yield tmp_path / "VLMEvalKit"
    for name in [n for n in sys.modules if n.partition(".")[0] == "vlmeval"]:
        del sys.modules[name]


@pytest.fixture
def model() -> Any:
    """The adapter without VLMEvalKit's base."""
    return adapter.VlmEvalKitAdapter(CHECKPOINT, device="cpu", dtype="fp32", settings="published")


NAN = float("nan")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            {"question": "Which?", "A": "x", "B": "y", "C": NAN, "hint": NAN},
            "Which?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            {"question": "Which?", "A": "x", "hint": "Look."},
            "Look.\nWhich?\nA. x\nAnswer with the option's letter from the given choices directly.",
        ),
        ({"question": "Which?", "A": None}, "Which?\nAnswer the question directly."),
        ({"question": "哪个?", "A": "x"}, "哪个?\nA. x\n请直接回答选项字母。"),
        ({"question": "哪个?"}, "哪个?\n请直接回答问题。"),
    ],
)
def test_published_wording_of_choices(line: dict[str, Any], text: str) -> None:
    assert adapter.multiple_choice_text(line) == text


def test_which_prompts_are_ours(vlmeval: Path, model: Any) -> None:
    ours = {
        name: model.use_custom_prompt(name) for name in ("AI2D_TEST", "HallusionBench", "POPE", "OCRBench", "Other")
    }
    assert ours == {"AI2D_TEST": True, "HallusionBench": True, "POPE": False, "OCRBench": False, "Other": False}
    model.dump_image = lambda line, dataset: "a.png"
    assert model.build_prompt({"question": "Is it?"}, "HallusionBench") == [
        {"type": "image", "value": "a.png"},
        {"type": "text", "value": "Is it?\nAnswer the question using a single word or phrase."},
    ]
    with pytest.raises(ValueError, match="POPE has a prompt of its own"):
        model.build_prompt({"question": "Is it?"}, "POPE")


def test_answers_are_the_chat_models(model: Any) -> None:
    """Same text, picture padded to a square, up to 512 tokens."""
    asked: list[Any] = []
    model.chat.answer = lambda conversations, decoding: asked.append((conversations, decoding)) or ["yes"]
    message = [{"type": "image", "value": str(PICTURE)}, {"type": "text", "value": "What?"}]
    assert model.generate_inner(message, "POPE") == "yes"
    (([turn],), decoding) = asked[0]
    assert decoding == Decoding(max_new_tokens=512)
    assert turn.parts[0].tobytes() == open_image(PICTURE).tobytes()
    assert turn.parts[1] == "What?"


def test_registration_is_in_memory(vlmeval: Path) -> None:
    joined = register("name", {"model_path": CHECKPOINT, "device": "cpu"})
    config, vlm = importlib.import_module("vlmeval.config"), importlib.import_module("vlmeval.vlm")
    assert vlm.MegatronRoss is joined
    assert issubclass(joined, importlib.import_module("vlmeval.vlm.base").BaseModel)
    built = config.supported_VLM["name"]()
    assert built.dump_image_func is None
    assert isinstance(built.chat, ChatModel)


def evaluate(tasks: str, output: Path, *extra: str, checkpoint: str = CHECKPOINT) -> int:
    words = ["--checkpoint", checkpoint, "--tasks", tasks, "--framework", "vlmevalkit", "--output", str(output)]
    return main([*words, "--device", "cpu", "--dtype", "fp32", *extra])


def test_one_command_and_what_run_py_does_not_say(
    vlmeval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "DECODING", Decoding(8))
    argv = list(sys.argv)
    assert evaluate("ai2d", tmp_path / "results", "--preset", "published") == 0
    assert sys.argv == argv
    (entry,) = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert (entry["task"], entry["percent"], entry["as_published"]) == ("AI2D_TEST", 25.0, False)  # fp32
    (answered,) = (tmp_path / "results").rglob("megatron_ross_AI2D_TEST.json")
    message, answer = json.loads(answered.read_text())
    chat = ChatModel.load(CHECKPOINT, preset("published", "vlmevalkit"), device="cpu", dtype="fp32")
    question = [user_turn(message[1]["value"], [open_image(PICTURE)])]
    assert "curious human" in chat.prompt(question)
    assert answer == chat.answer([question], Decoding(8))[0]
    assert "| AI2D | vlmevalkit | none.Overall | 25.0 |" in (tmp_path / "results" / "results.md").read_text()

    assert evaluate("pope", tmp_path / "other") == 1
    assert "error: vlmevalkit left no score of POPE" in capsys.readouterr().err
    assert not (tmp_path / "other" / "results.json").exists()


def test_answers_of_other_weights_are_never_taken(
    vlmeval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.py goes on with the answers that it finds; after a crash there is no results.json that would refuse them."""
    monkeypatch.setattr(adapter, "DECODING", Decoding(1))
    original = Path(CHECKPOINT)
    for name in (original.name, "vision_clip", "vae"):  # the latter two are named in its config
        shutil.copytree(original.parent / name, tmp_path / name)
    checkpoint = tmp_path / original.name
    folders = []
    for changes in (False, False, True):
        if changes:
            (checkpoint / "config.json").touch()
        assert evaluate("pope", tmp_path / "results", checkpoint=str(checkpoint)) == 1
        folders.append(
            [len(list(f.rglob("megatron_ross_POPE.json"))) for f in (tmp_path / "results/vlmevalkit").iterdir()]
        )
    assert folders[:2] == [[1], [2]]
    assert sorted(folders[2]) == [1, 2]


def test_scores_of_an_earlier_call_are_never_taken(
    vlmeval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.py ends with status 0 when it crashes, too. The answers stay, for it to go on with."""
    monkeypatch.setattr(adapter, "DECODING", Decoding(1))
    output = tmp_path / "results"
    assert evaluate("ai2d", output) == 0
    (vlmeval / "run.py").write_text("print('failed: this version is broken')\n")
    assert evaluate("ai2d", output, "--reuse", "false") == 1
    assert "error: vlmevalkit left no score of AI2D_TEST" in capsys.readouterr().err
    assert list(output.rglob("megatron_ross_AI2D_TEST.json"))


def test_ranks_but_the_first_leave_the_results_to_it(
    vlmeval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "DECODING", Decoding(8))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate("ai2d", tmp_path / "results") == 0
    assert list((tmp_path / "results").rglob("megatron_ross_AI2D_TEST.json")), "it answers, too"
    assert not list((tmp_path / "results").glob("results.*"))
    assert "results.md" not in capsys.readouterr().out


def test_a_result_file_without_the_metric_of_the_table(
    vlmeval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "DECODING", Decoding(8))
    assert evaluate("mmmu", tmp_path / "results") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: vlmevalkit gave no validation.Overall of mmmu, only none.Overall")
    (entry,) = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert entry["scores"] == {"none.Overall": 0.25}


def test_run_py_that_is_not_there(vlmeval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_run_py() == vlmeval / "run.py"
    assert evaluate("ai2d", tmp_path / "results", "--vlmevalkit", str(tmp_path)) == 1
    assert "run.py is missing: --vlmevalkit must name" in capsys.readouterr().err


def test_score_files(tmp_path: Path) -> None:
    (tmp_path / "megatron_ross_MMMU_DEV_VAL_acc.csv").write_text("split,Overall,Art\nvalidation,0.5,0.25\ndev,0.75,\n")
    (tmp_path / "megatron_ross_OCRBench_score.json").write_text('{"Final Score Norm": 31.5, "note": "x"}')
    (tmp_path / "megatron_ross_GQA_acc.csv").write_text("Overall,object\n61.5,nan\n")
    assert read_scores(tmp_path, "MMMU_DEV_VAL") == {
        "validation.Overall": 0.5,
        "validation.Art": 0.25,
        "dev.Overall": 0.75,
    }
    assert read_scores(tmp_path, "OCRBench") == {"Final Score Norm": 31.5}
    assert read_scores(tmp_path, "GQA") == {"Overall": 61.5}
    assert read_scores(tmp_path, "POPE") == {}


def test_one_data_set_that_crashes_costs_only_itself(
    vlmeval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the answers of a call that broke off are taken up: with --reuse, not by looking for those of the same day."""
    monkeypatch.setattr(adapter, "DECODING", Decoding(1))
    loaded: list[str] = []
    load = ChatModel.load
    monkeypatch.setattr(ChatModel, "load", lambda path, *a, **k: loaded.append(path) or load(path, *a, **k))
    output, run_py = tmp_path / "results", (vlmeval / "run.py").read_text()
    (vlmeval / "run.py").write_text(run_py.replace("POPE", "RealWorldQA"))
    assert evaluate("realworldqa,ai2d", output) == 1
    assert loaded == [CHECKPOINT], "one model for both data sets"
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: vlmevalkit left no score of RealWorldQA")
    assert message.endswith("missing: realworldqa; the same command asks for nothing else again")
    (entry,) = json.loads((output / "results.json").read_text())["results"]
    assert entry["benchmark"] == "ai2d"
    assert "No score: vlmevalkit realworldqa: vlmevalkit left no score" in (output / "results.md").read_text()

    # The data set's scoring is mended; the model must not be asked for what it has answered.
    (vlmeval / "run.py").write_text(run_py)
    monkeypatch.setattr(adapter.VlmEvalKitAdapter, "generate_inner", lambda *a, **k: pytest.fail("asked again"))
    assert evaluate("realworldqa,ai2d", output) == 0
    assert "ai2d (vlmevalkit): taken up from" in capsys.readouterr().out
    assert not (output / "missing.json").exists()


def test_a_data_set_under_its_own_name_fills_the_table(
    vlmeval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AI2D_TEST is the table's AI2D; a data set that the table does not know shows its overall score."""
    monkeypatch.setattr(adapter, "DECODING", Decoding(1))
    assert evaluate("AI2D_TEST,SomeOther", tmp_path / "results") == 0
    table = (tmp_path / "results" / "results.md").read_text()
    assert "| AI2D | vlmevalkit | none.Overall | 25.0 |" in table
    assert "| SomeOther | vlmevalkit | none.Overall | 0.2 |" in table
    assert "As the framework scales them, with one of their metrics: SomeOther" in table

"""Exports answer as they were trained: tokenizer settings, padding, end tokens, template, Auto classes, the card."""

from __future__ import annotations

import ast
import base64
import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig, pipeline

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.convert.inference_files import (
    chosen_template,
    load_source_tokenizer,
    portable_settings,
    template_end_ids,
    with_ends,
)
from megatron_ross.convert.model_card import _license
from megatron_ross.data.tokenizer import TextTokenizer
from megatron_ross.evaluation.generate import ChatSession, load_for_inference
from megatron_ross.evaluation.options import Decoding
from megatron_ross.huggingface import RossProcessor, RossQwen2ForCausalLM
from megatron_ross.huggingface.chat_templates import chat_template
from tests.helpers.random_llava import make_exports
from tests.helpers.sources import ROOT

FORMATS = ("llava", "ross")
END, END_OF_TEXT = 575, 573  # <|im_end|>, <|endoftext|> of the golden Qwen2 tokenizer


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """`exports("llama_clip")["ross"]`: a random model in one of the formats."""
    return functools.cache(lambda model: make_exports(tmp_path_factory.mktemp("exports"), model))


@pytest.fixture
def picture(golden_dir: Path) -> Path:
    return golden_dir / "preprocess" / "images" / "portrait.jpg"


@pytest.fixture
def address(picture: Path) -> Iterator[str]:
    """http address of the picture."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(picture.parent))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{picture.name}"
    server.shutdown()


def base_model(golden_dir: Path, folder: Path) -> Path:
    """The golden Qwen2 as base models are published: every file ends a text at <|endoftext|>, none a turn."""
    shutil.copytree(golden_dir / "llm_qwen2", folder)
    for name, values in (
        ("config.json", {"eos_token_id": END_OF_TEXT}),
        ("generation_config.json", {"eos_token_id": END_OF_TEXT, "max_new_tokens": 2048}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
    ):
        edit(folder / name, **values)
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite_manifest(root: Path, **values: Any) -> None:
    iteration = resolve_checkpoint(root)
    replace(Manifest.read(iteration), **values).write(iteration)


def export(llm: Path, golden_dir: Path, folder: Path, format: str) -> Path:
    """A language model with the golden SigLIP tower, imported and exported."""
    if not (folder / "in").exists():
        import_checkpoint(folder / "in", llm=str(llm), vision_tower=str(golden_dir / "vision_siglip"))
    export_checkpoint(folder / "in", folder / format, format, templates=chat_template)
    return folder / format


@pytest.mark.parametrize("format", FORMATS)
def test_answers_of_a_base_model_end_with_the_turn(format: str, golden_dir: Path, tmp_path: Path) -> None:
    """Training ends answers with <|im_end|>, which no file of the base model names."""
    folder = export(base_model(golden_dir, tmp_path / "base"), golden_dir, tmp_path, format)
    stored = json.loads((folder / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [END, END_OF_TEXT]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [END, END_OF_TEXT]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, END_OF_TEXT)
    assert _new_tokens(folder) == [END]


def _new_tokens(folder: Path) -> list[int]:
    """Tokens of a model that says the end of a turn, whatever it is asked."""
    model, processor = load_for_inference(str(folder), device="cpu")
    inputs = processor(text="USER: Hello ASSISTANT:", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, sequence_bias=[[[END], 1e4]])
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_folders_that_do_not_name_the_end_are_asked_right(format: str, golden_dir: Path, tmp_path: Path) -> None:
    """An export of an earlier version, or the published code's: our programs end with the template all the same."""
    folder = export(base_model(golden_dir, tmp_path / "base"), golden_dir, tmp_path, format)
    edit(folder / "generation_config.json", eos_token_id=END_OF_TEXT)
    assert _new_tokens(folder) == [END]


@pytest.mark.parametrize(
    ("stored", "ends", "expected"),
    [
        (2, [2], 2),
        (None, [7], 7),
        (None, [], None),
        (3, [7], [7, 3]),
        ([3, 7], [7], [3, 7]),
        ([3, 4], [7], [7, 3, 4]),
        ([3], [], [3]),
        (3, [7, 9, 3], [7, 9, 3]),
    ],
)
def test_end_tokens_are_added_to_those_that_are_there(stored: Any, ends: list[int], expected: Any) -> None:
    assert with_ends(stored, ends) == expected


@pytest.mark.parametrize("source", ["llm_qwen2", "llm_vicuna"])
def test_tokens_that_end_a_template(source: str, golden_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden_dir / source)
    own = "qwen_2" if source == "llm_qwen2" else "v1"
    assert template_end_ids(own, tokenizer) == [tokenizer.eos_token_id]
    assert template_end_ids("llama3", tokenizer) == []  # no such token: the template does not fit
    assert template_end_ids(None, tokenizer) == []
    training = TextTokenizer(tokenizer)
    assert training.encode("a cat\n")[-1] in template_end_ids("plain", tokenizer)
    assert all(training.decode([token]).endswith("\n") for token in template_end_ids("plain", tokenizer))


@pytest.mark.parametrize("format", FORMATS)
def test_captions_end_with_their_line_only_when_asked(format: str, golden_dir: Path, tmp_path: Path) -> None:
    """`plain` ends with a newline. In the files it would cut the answers of a stage that starts from them."""
    export(golden_dir / "llm_qwen2", golden_dir, tmp_path, "ross")
    rewrite_manifest(tmp_path / "in", training={"settings": {"template": "plain"}})
    export_checkpoint(tmp_path / "in", tmp_path / "plain", format, templates=chat_template)
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["eos_token_id"] == END
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token_id == END
    model, processor = load_for_inference(str(tmp_path / "plain"), device="cpu")
    newline = TextTokenizer(AutoTokenizer.from_pretrained(golden_dir / "llm_qwen2")).encode("x\n")[-1]
    assert {newline, END} <= set(model.generation_config.eos_token_id)
    assert processor.chat_template == chat_template("plain")


def test_settings_that_one_major_version_does_not_read_are_translated() -> None:
    tokenizer: Any = SimpleNamespace(padding_side="left", eos_token="</s>", pad_token="<unk>")
    saved = {
        "backend": "tokenizers",
        "is_local": True,
        "local_files_only": True,
        "extra_special_tokens": ["<a>", "<b>"],
        "tokenizer_class": "TokenizersBackend",
        "chat_template": "of another model",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
        "padding_side": "right",
        "legacy": False,
    }
    assert portable_settings(saved, tokenizer) == {
        "additional_special_tokens": ["<a>", "<b>"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
        "pad_token": "<unk>",
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "legacy": False,
    }
    named = {"extra_special_tokens": {"image_token": "<image>"}, "model_input_names": ["input_ids"]}
    assert portable_settings(named, tokenizer).items() >= named.items()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("stored", [END_OF_TEXT, -1, 100_000, None])
def test_there_is_a_padding_token(stored: int | None, format: str, golden_dir: Path, tmp_path: Path) -> None:
    """-1, and ids beyond the vocabulary, are how old configs say that there is none."""
    llm = shutil.copytree(golden_dir / "llm_qwen2", tmp_path / "llm")
    edit(llm / "tokenizer_config.json", pad_token=None, padding_side="right")
    edit(llm / "generation_config.json", pad_token_id=stored)
    folder = export(llm, golden_dir, tmp_path, format)
    expected = END_OF_TEXT if stored == END_OF_TEXT else END
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (expected, "left")
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == expected
    if format == "llava":
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == expected


def test_the_chat_template_is_the_training_one(golden_dir: Path, tmp_path: Path) -> None:
    """A language model brings its own, which knows no images; a model that was asked with images keeps its own."""
    llm = shutil.copytree(golden_dir / "llm_qwen2", tmp_path / "llm")
    (llm / "chat_template.jinja").write_text("{{ messages }}")
    edit(llm / "tokenizer_config.json", chat_template="{{ messages }}")
    folder = export(llm, golden_dir, tmp_path, "ross")
    assert AutoTokenizer.from_pretrained(folder).chat_template == chat_template("qwen_2")
    assert RossProcessor.from_pretrained(folder).chat_template == chat_template("qwen_2")
    reader = open_checkpoint(tmp_path / "in")
    tokenizer = load_source_tokenizer(reader)
    for text, name in ((chat_template("v1"), "v1"), ("own <image>", None)):
        tokenizer.chat_template = text
        assert chosen_template(reader, tokenizer, chat_template).__dict__ == {"name": name, "text": text}
    reader.manifest.training["settings"] = {"template": "llama3"}
    assert chosen_template(reader, tokenizer, chat_template).name == "llama3"


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_comes_back_is_exported_alike(
    format: str, exports: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    """Import it, export it again: no file of settings changes, no end token is added twice."""
    first = exports("llama_clip")[format]
    import_checkpoint(tmp_path / "in", checkpoint=str(first))
    export_checkpoint(tmp_path / "in", tmp_path / "out", format, templates=chat_template)
    same = {"tokenizer_config.json", "generation_config.json", "chat_template.jinja", "processor_config.json"}
    same |= {"tokenizer.json", "preprocessor_config.json"}
    assert {file.name for file in first.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes(), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", ["qwen2_siglip", "llama_clip"])
def test_pictures_in_a_conversation(
    model: str, format: str, exports: Callable[[str], dict[str, Path]], picture: Path, address: str
) -> None:
    """A path, an address, a data URL and a PIL image are the same picture, in the chat template and in the pipeline."""
    folder = exports(model)[format]
    processor = AutoProcessor.from_pretrained(folder)
    encoded = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
    sources = [{"image": Image.open(picture)}, {"path": str(picture)}, {"url": address}, {"url": encoded}]
    inputs = [
        processor.apply_chat_template(
            asked("What is it?", source),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for source in sources
    ]
    for other in inputs[1:]:
        assert torch.equal(other["input_ids"], inputs[0]["input_ids"])
        assert torch.equal(other["pixel_values"], inputs[0]["pixel_values"])
    network, ours = load_for_inference(str(folder), device="cpu")
    expected = ChatSession(network, ours, Decoding(6)).ask("What is it?", [Image.open(picture).convert("RGB")])
    ask = pipeline("image-text-to-text", model=str(folder), device="cpu")
    for source in sources:
        answer = ask(text=asked("What is it?", source), max_new_tokens=6, do_sample=False, return_full_text=False)
        assert answer[0]["generated_text"].strip() == expected


def test_an_export_in_the_other_format_names_no_file_that_is_not_there(
    exports: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    import_checkpoint(tmp_path / "in", checkpoint=str(exports("qwen2_siglip")["llava"]))
    export_checkpoint(tmp_path / "in", tmp_path / "ross", "ross", templates=chat_template)
    for file in (tmp_path / "ross").glob("*.json"):
        for reference in json.loads(file.read_text()).get("auto_map", {}).values():
            assert (tmp_path / "ross" / f"{reference.split('.')[0]}.py").is_file(), (file.name, reference)
    assert type(AutoProcessor.from_pretrained(tmp_path / "ross")) is RossProcessor


def asked(question: str, source: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("format", FORMATS)
def test_batches_answer_as_single_questions(
    format: str, exports: Callable[[str], dict[str, Path]], picture: Path
) -> None:
    """What a stock user writes: a batch of conversations through the processor's template, padded by its tokenizer."""
    folder = exports("qwen2_siglip")[format]
    processor = AutoProcessor.from_pretrained(folder)
    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    questions = ["What is it?", "What is it, and how many dogs run near the river over there?"]
    batch = [asked(question, {"path": str(picture)}) for question in questions]

    def answers(conversations: list[Any]) -> list[list[int]]:
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        output = network.generate(**inputs, max_new_tokens=6, do_sample=False)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    assert answers(batch) == [answers([conversation])[0] for conversation in batch]
    assert processor.tokenizer.padding_side == "left"


STOCK_USER = """
import sys
{statement}
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, options = sys.argv[1], {options}
for auto in ({first}):
    assert type(auto.from_pretrained(folder, **options)).__module__.startswith("megatron_ross.huggingface."), auto
content = [{{"type": "image", "url": sys.argv[2]}}, {{"type": "text", "text": "What?"}}]
answer = pipeline("image-text-to-text", model=folder, device="cpu", **options)(
    text=[{{"role": "user", "content": content}}], max_new_tokens=4, do_sample=False, return_full_text=False)
print(answer[0]["generated_text"].encode())
"""


@pytest.mark.parametrize(
    ("statement", "options", "first"),
    [
        ("", {"trust_remote_code": True}, "AutoProcessor,"),  # each finds our package, and the others know it then
        ("", {"trust_remote_code": True}, "AutoModelForImageTextToText, AutoModel"),
        ("import megatron_ross.huggingface", {}, "AutoModel, AutoModelForImageTextToText, AutoProcessor"),
    ],
)
def test_auto_classes_find_ours(
    statement: str,
    options: dict[str, bool],
    first: str,
    exports: Callable[[str], dict[str, Path]],
    picture: Path,
    tmp_path: Path,
) -> None:
    """In a process of a user's own. The tower's preprocessor_config.json names SiglipProcessor."""
    folder = exports("qwen2_siglip")["ross"]
    assert json.loads((folder / "preprocessor_config.json").read_text())["processor_class"] == "SiglipProcessor"
    script = STOCK_USER.format(statement=statement, options=options, first=first)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(picture)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    network, processor = load_for_inference(str(folder), device="cpu")
    assert isinstance(network, RossQwen2ForCausalLM)
    expected = ChatSession(network, processor, Decoding(4)).ask("What?", [Image.open(picture).convert("RGB")])
    assert ast.literal_eval(done.stdout).decode().strip() == expected


@pytest.mark.parametrize("format", FORMATS)
def test_the_snippet_of_the_card_runs(
    format: str, exports: Callable[[str], dict[str, Path]], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exports("qwen2_siglip")[format]
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in snippet.splitlines() if line]) <= 5
    code = textwrap.dedent(snippet).replace("THIS_FOLDER_OR_HUB_ID", str(folder)).replace("cat.jpg", str(picture))
    exec(compile(code, "README.md", "exec"), {})
    assert "generated_text" in capsys.readouterr().out


def test_the_card_names_bases_terms_and_servers(
    exports: Callable[[str], dict[str, Path]], golden_dir: Path, tmp_path: Path
) -> None:
    card = (exports("llama_clip")["llava"] / "README.md").read_text()
    assert "vllm serve" in card
    assert "--chat-template THIS_FOLDER/chat_template_with_begin_token.jinja" in card
    assert "transformers serve" in card
    assert "--chat-template" not in (exports("qwen2_siglip")["llava"] / "README.md").read_text()
    assert "image_conversion: viewer" not in card
    assert "vllm serve" not in (exports("llama_clip")["ross"] / "README.md").read_text()
    import_checkpoint(
        tmp_path / "in", llm=str(golden_dir / "llm_qwen2"), vision_tower=str(golden_dir / "vision_siglip"),
        vae=str(golden_dir / "vae"),
    )  # fmt: skip
    sources = open_checkpoint(tmp_path / "in").manifest.sources
    names = ("Qwen/Qwen2-7B-Instruct", "google/siglip-so400m-patch14-384", "black-forest-labs/FLUX.1-dev")
    renamed = tuple(replace(source, name=name) for source, name in zip(sources, names, strict=True))
    rewrite_manifest(tmp_path / "in", sources=renamed)
    for format, bases, terms in (("llava", names[:2], "apache-2.0"), ("ross", names, "other")):
        export_checkpoint(tmp_path / "in", tmp_path / format, format, templates=chat_template)
        card = (tmp_path / format / "README.md").read_text()
        head = yaml.safe_load(card.split("---\n")[1])
        assert (tuple(head["base_model"]), head["license"]) == (bases, terms)
    assert "black-forest-labs/FLUX.1-dev (flux-1-dev-non-commercial-license)" in card


def test_the_license_is_told_only_where_all_terms_are_known() -> None:
    siglip = "google/siglip-so400m-patch14-384"
    assert _license({"language": "lmsys/vicuna-7b-v1.5", "vision": siglip}) == "llama2"
    assert _license({"language": "somebody/model", "vision": siglip}) == "other"
    assert _license({"language": "Qwen/Qwen2-7B", "vision": "somebody/tower"}) == "other"
    assert _license({"model": "llava-hf/llava-1.5-7b-hf"}) == "other"
    assert _license({}) == "other"


def test_a_server_that_adds_no_begin_token_gets_a_template_with_it(
    exports: Callable[[str], dict[str, Path]],
) -> None:
    folder = exports("llama_clip")["llava"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = "<image>\nWhat is it?"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    conversation = [*turns, {"role": "user", "content": "Sure?"}]
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    served = tokenizer.apply_chat_template(
        conversation,
        chat_template=(folder / "chat_template_with_begin_token.jinja").read_text(),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer(served, add_special_tokens=False).input_ids == tokenizer(text).input_ids
    assert not (exports("qwen2_siglip")["llava"] / "chat_template_with_begin_token.jinja").exists()


def llama3_like(golden_dir: Path, folder: Path) -> Path:
    """The golden Llama weights with a byte-level tokenizer that adds a begin token and has no padding token."""
    shutil.copytree(golden_dir / "llm_vicuna", folder, ignore=shutil.ignore_patterns("tok*", "special*"))
    text = (golden_dir / "llm_qwen2" / "tokenizer.json").read_text()
    for old, new in (
        ("<|endoftext|>", "<|begin_of_text|>"),
        ("<|im_start|>", "<|end_of_text|>"),
        ("<|im_end|>", "<|eot_id|>"),
    ):
        text = text.replace(old, new)
    begin = "<|begin_of_text|>"
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [END_OF_TEXT], "tokens": [begin]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(text) | {"post_processor": processor}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": 574, "pad_token_id": None}
    edit(folder / "config.json", **ids)
    edit(folder / "generation_config.json", **ids)
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_a_llama3_like_base_model(format: str, golden_dir: Path, tmp_path: Path) -> None:
    """Ends at <|end_of_text|>, trained to end at <|eot_id|>; a begin token in front; nothing to pad with."""
    folder = export(llama3_like(golden_dir, tmp_path / "llm"), golden_dir, tmp_path, format)
    stored = json.loads((folder / "generation_config.json").read_text())
    assert (stored["eos_token_id"], stored["pad_token_id"]) == ([END, 574], END)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token_id) == (
        "<|eot_id|>",
        "<|eot_id|>",
        END_OF_TEXT,
    )
    assert tokenizer.chat_template == chat_template("llama3")
    assert _new_tokens(folder) == [END]
    text = tokenizer.apply_chat_template(asked("What is it?", {}), add_generation_prompt=True, tokenize=False)
    assert tokenizer(text).input_ids[:2].count(END_OF_TEXT) == 1
    if format == "llava":
        served = tokenizer.apply_chat_template(
            asked("What is it?", {}),
            chat_template=(folder / "chat_template_with_begin_token.jinja").read_text(),
            add_generation_prompt=True,
            tokenize=False,
        )
        assert tokenizer(served, add_special_tokens=False).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("legacy", [True, False])
def test_both_kinds_of_sentencepiece_get_a_serving_template(legacy: bool, golden_dir: Path, tmp_path: Path) -> None:
    llm = shutil.copytree(golden_dir / "llm_vicuna", tmp_path / "llm")
    edit(llm / "tokenizer_config.json", legacy=legacy)
    (llm / "tokenizer.json").unlink()
    folder = export(llm, golden_dir, tmp_path, "llava")
    assert (folder / "chat_template_with_begin_token.jinja").is_file()

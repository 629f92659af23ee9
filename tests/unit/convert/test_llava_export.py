"""The LLaVA export in stock transformers, without any class of ours: strict load, golden losses, greedy outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.config.model import IMAGE_TOKEN_ID, ProjectorConfig
from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.convert.layouts import llava_mappings
from megatron_ross.convert.llava_export import _notes
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.tokenizer import TextTokenizer
from megatron_ross.huggingface.chat_templates import chat_template

NAMES = ["qwen2_siglip", "llama_clip"]
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
Exported = Callable[[str], Path]


@pytest.fixture(scope="session")
def exported(imported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("llava") / name
            export_checkpoint(imported(name), folders[name], "llava", templates=chat_template)
        return folders[name]

    return get


def _model(folder: Path) -> torch.nn.Module:
    """Loaded strictly: no tensor missing, none left over."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert type(model).__module__.startswith("transformers.")
    return model.eval()


def _collapsed(ids: list[int], image_token_id: int) -> list[int]:
    """Ids with every run of image tokens as one IMAGE_TOKEN_ID."""
    collapsed: list[int] = []
    for token in ids:
        token = IMAGE_TOKEN_ID if token == image_token_id else token
        if token != IMAGE_TOKEN_ID or collapsed[-1:] != [IMAGE_TOKEN_ID]:
            collapsed.append(token)
    return collapsed


@pytest.mark.parametrize("name", NAMES)
def test_golden_losses(name: str, exported: Exported, golden_dir: Path) -> None:
    """Per-token losses of the golden case with two images per sample equal the published code's."""
    case = load_file(golden_dir / "goldens" / name / "case_c_two_images_lm_only.safetensors")
    model = _model(exported(name))
    image_id, per_image = model.config.image_token_id, case["out.image_embeds"].shape[1]
    consumed = 0
    rows = zip(case["in.input_ids"], case["in.attention_mask"].bool(), case["out.lm_nll"], strict=True)
    for row, (ids, mask, expected) in enumerate(rows):
        tokens: list[int] = []
        for token in ids[mask].tolist():
            tokens += [image_id] * per_image if token == IMAGE_TOKEN_ID else [token]
        num_images = int((ids[mask] == IMAGE_TOKEN_ID).sum())
        pixels = case["in.images"][consumed : consumed + max(num_images, 1)]
        consumed += max(num_images, 1)  # a sample without image still consumes one dummy
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), pixel_values=pixels if num_images else None).logits[0]
        labels = case["out.new_labels"][row, 1 : len(tokens)]
        nll = F.cross_entropy(logits[:-1, : model.config.text_config.vocab_size - 1], labels, reduction="none")
        torch.testing.assert_close(nll, expected[: len(nll)], rtol=1e-4, atol=1e-4)
        assert (labels >= 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_golden_prompts_give_the_golden_answers(name: str, exported: Exported, golden_dir: Path) -> None:
    model, processor = _model(exported(name)), AutoProcessor.from_pretrained(exported(name))
    for case in json.loads((golden_dir / "goldens" / name / "greedy_generation.json").read_text()):
        image = Image.open(golden_dir / "preprocess" / "images" / case["image"])
        inputs = processor(images=[image], text=[case["prompt"]], return_tensors="pt")
        prompt = inputs["input_ids"][0].tolist()
        assert _collapsed(prompt, model.config.image_token_id) == case["input_ids"]
        model.generation_config.eos_token_id = None
        output = model.generate(**inputs, max_new_tokens=len(case["generated"]))
        assert output[0, len(prompt) :].tolist() == case["generated"]


@pytest.mark.parametrize("name", NAMES)
def test_processor_pixels_are_those_of_training(
    name: str, exported: Exported, imported: Callable[[str], Path], golden_dir: Path
) -> None:
    processor = AutoProcessor.from_pretrained(exported(name))
    ours = ImageProcessor.from_config(open_checkpoint(imported(name)).manifest.model.vision)
    for file in ("landscape.png", "portrait.jpg", "rgba.png", "gray.png", "thin.png"):
        image = Image.open(golden_dir / "preprocess" / "images" / file).convert("RGB")
        theirs = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(theirs, ours(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_chat_template_gives_the_ids_of_training(name: str, exported: Exported, golden_dir: Path) -> None:
    """Two turns with an image each, as messages; `TextTokenizer` is what training uses."""
    folder = exported(name)
    processor = AutoProcessor.from_pretrained(folder)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on the table?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And here?"}]},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    source = AutoTokenizer.from_pretrained(golden_dir / f"llm_{name.split('_')[0].replace('llama', 'vicuna')}")
    wanted = TextTokenizer(source).encode_with_images(prompt)
    image_id = json.loads((folder / "config.json").read_text())["image_token_index"]
    got = [IMAGE_TOKEN_ID if token == image_id else token for token in processor.tokenizer(prompt).input_ids]
    assert got == wanted
    assert got.count(IMAGE_TOKEN_ID) == 2


def test_batched_generation_equals_single(exported: Exported, golden_dir: Path) -> None:
    """Left padding: prompts of different length in one batch answer as they do alone."""
    folder = exported("qwen2_siglip")
    model, processor = _model(folder), AutoProcessor.from_pretrained(folder)
    image = Image.open(golden_dir / "preprocess" / "images" / "landscape.png")
    prompts = ["USER: <image>\nWhat is this? ASSISTANT:", "USER: <image>\nWhat is on the table over there? ASSISTANT:"]
    model.generation_config.eos_token_id = None

    def answers(texts: list[str]) -> list[list[int]]:
        inputs = processor(images=[[image]] * len(texts), text=texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=6)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


def test_sentencepiece_tokenizers_without_tokenizer_json(golden_dir: Path, tmp_path: Path) -> None:
    """Vicuna's repository has tokenizer.model only; ids around the image are still those of training."""
    llm = shutil.copytree(golden_dir / "llm_vicuna", tmp_path / "llm")
    (llm / "tokenizer.json").unlink()
    import_checkpoint(tmp_path / "in", llm=str(llm), vision_tower=str(golden_dir / "vision_clip"))
    export_checkpoint(tmp_path / "in", tmp_path / "out", "llava", dtype="bfloat16", templates=chat_template)
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    for case in json.loads((golden_dir / "goldens" / "llama_clip" / "greedy_generation.json").read_text()):
        assert _collapsed(list(tokenizer(case["prompt"]).input_ids), 576) == case["input_ids"]
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_image_token_gets_a_row_of_its_own_and_is_suppressed(exported: Exported, golden_dir: Path) -> None:
    """The golden vocabulary is full (576 of 576): one row is added, a copy of the padding token's."""
    folder = exported("qwen2_siglip")
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (576, 577)
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == [576]
    embedding = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"]
    golden = load_file(golden_dir / "ross_qwen2_siglip" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding[:576], golden)
    assert torch.equal(embedding[576], golden[config["pad_token_id"]])


def test_spare_rows_are_used_before_the_vocabulary_grows(
    golden_dir: Path, golden_llm_copy: Path, tmp_path: Path
) -> None:
    """Qwen2's embedding has more rows than its tokenizer has tokens: `<image>` takes the first spare one."""
    tensors = load_file(golden_llm_copy / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.randn(64, 64)])
    save_file(tensors, golden_llm_copy / "model.safetensors", {"format": "pt"})
    config = json.loads((golden_llm_copy / "config.json").read_text())
    (golden_llm_copy / "config.json").write_text(json.dumps(config | {"vocab_size": 640}))
    import_checkpoint(tmp_path / "in", llm=str(golden_llm_copy), vision_tower=str(golden_dir / "vision_siglip"))
    export_checkpoint(tmp_path / "in", tmp_path / "out", "llava", templates=chat_template)
    exported_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (exported_config["image_token_index"], exported_config["text_config"]["vocab_size"]) == (576, 640)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["language_model.lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_stock_llava_comes_back_in(
    name: str, exported: Exported, imported: Callable[[str], Path], golden_dir: Path, tmp_path: Path
) -> None:
    """Import of the export, and of what transformers itself saves (other key layout): equal but for the added row."""
    original = open_checkpoint(imported(name))
    model = _model(exported(name))
    model.save_pretrained(tmp_path / "resaved")
    for file in exported(name).iterdir():
        if file.name.startswith(("tokenizer", "preprocessor", "vocab", "merges")):
            shutil.copy(file, tmp_path / "resaved")
    for number, folder in enumerate((exported(name), tmp_path / "resaved")):
        import_checkpoint(tmp_path / str(number), checkpoint=str(folder))
        again = open_checkpoint(tmp_path / str(number))
        assert again.manifest.model.denoiser is None
        assert again.manifest.model.language == replace(original.manifest.model.language, vocab_size=577)
        assert again.manifest.model.vision.image_aspect_ratio == "pad"
        for key in again.keys():  # noqa: SIM118
            kept = again.read(key)[:576] if key in VOCABULARY else again.read(key)
            assert torch.equal(kept, original.read(key)), key


def test_model_card_says_what_is_missing(exported: Exported) -> None:
    card = (exported("qwen2_siglip") / "README.md").read_text()
    assert "denoiser and the image auto-encoder" in card
    assert "are left out" in card


def test_model_card_warns_of_pictures_that_stock_processors_show_otherwise() -> None:
    """A checkpoint trained as a viewer shows pictures; the published way is what those processors do."""
    shown, published = (" ".join(_notes(576, 0, way)) for way in ("viewer", "published"))
    assert "image_conversion: viewer" in shown
    assert "image_conversion" not in published


def test_other_projectors_do_not_fit(imported: Callable[[str], Path]) -> None:
    model = open_checkpoint(imported("qwen2_siglip")).manifest.model
    with pytest.raises(ValueError, match="two-layer projector"):
        llava_mappings(replace(model, projector=ProjectorConfig("linear")))

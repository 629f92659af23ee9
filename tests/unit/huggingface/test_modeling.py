"""Inference classes against the golden cases: strict loading, logits, greedy generation, reconstruction."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, pipeline

from megatron_ross.huggingface import RossForConditionalGeneration, RossLlamaForCausalLM, RossProcessor
from megatron_ross.huggingface.processing_ross import expand_image_tokens
from megatron_ross.models.pictures import to_pil
from tests.helpers import golden

CLASS_NAMES = {"qwen2_siglip": "RossQwen2ForCausalLM", "llama_clip": "RossLlamaForCausalLM"}


@functools.cache
def load(model: str) -> Any:
    return RossForConditionalGeneration.from_pretrained(golden.checkpoint_dir(model))


@functools.cache
def processor(model: str) -> RossProcessor:
    return RossProcessor.from_pretrained(golden.checkpoint_dir(model))


def expanded(data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Golden inputs with expanded images, right-padded: ids and attention mask as wide as `out.new_labels`."""
    width = data["out.new_labels"].shape[1]
    ids = torch.zeros(len(data["in.input_ids"]), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (row, keep) in enumerate(zip(data["in.input_ids"], data["in.attention_mask"].bool(), strict=True)):
        tokens = expand_image_tokens(row[keep].tolist(), 16)[:width]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
    return ids, mask


def copy_checkpoint(model: str, parent: Path) -> Path:
    """Writable copy of a composite with the folders its config names beside it."""
    info = golden.metadata()["models"][model]
    for name in (info["composite"], info["vision_tower"], info["auto_encoder"]):
        shutil.copytree(golden.GOLDEN / name, parent / name)
    return parent / info["composite"]


@pytest.mark.parametrize("model", golden.MODELS)
def test_every_tensor_is_loaded_under_its_published_name(model: str) -> None:
    loaded, expected = load(model).state_dict(), golden.composite(model)
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("letter", ["a", "b", "c", "e", "f"])
def test_logits_and_hidden_states_equal_golden(model: str, letter: str) -> None:
    data = golden.case(model, letter)
    inputs = {**golden.case(model, "a"), **data} if letter == "e" else data
    ids, mask = expanded(inputs)
    images = inputs.get("in.images")
    if images is not None:  # the dummy image of a text-only sample is not part of our inputs
        has_image = (inputs["in.input_ids"] == -200).sum(1)
        images = images[torch.repeat_interleave(has_image > 0, has_image.clamp(min=1))]
    network = load(model)
    with torch.no_grad():
        out = network(input_ids=ids, pixel_values=images, attention_mask=mask, output_hidden_states=True)
    real = mask.bool()
    nll = (
        torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1),
            data["out.new_labels"][:, 1:].flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        / (data["out.new_labels"][:, 1:] != -100).sum()
    )
    torch.testing.assert_close(nll, data["out.lm_loss"], rtol=golden.tolerance("losses_relative"), atol=0)
    if "out.logits" in data:
        golden.assert_close(out.logits[real], data["out.logits"][real], golden.tolerance("logits_max_over_maxabs"))
    hidden = data["out.hidden_states"][-1] if "out.hidden_states" in data else data.get("out.hidden_final")
    if hidden is not None:
        limit = golden.tolerance("hidden_states_max_over_maxabs")
        golden.assert_close(out.hidden_states[-1][real], hidden[real], limit)


def prompts(model: str) -> list[dict[str, Any]]:
    return json.loads((golden.GOLDEN / "goldens" / model / "greedy_generation.json").read_text())


def image(name: str) -> Image.Image:
    return Image.open(golden.GOLDEN / "preprocess" / "images" / name)


@pytest.mark.parametrize("model", golden.MODELS)
def test_greedy_generation_equals_golden_token_for_token(model: str) -> None:
    for record in prompts(model):
        inputs = processor(model)(text=record["prompt"], images=image(record["image"]))
        assert inputs["input_ids"][0].tolist() == expand_image_tokens(record["input_ids"], 16)
        out = load(model).generate(**inputs, max_new_tokens=len(record["generated"]), do_sample=False)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == record["generated"]


@pytest.mark.parametrize("model", golden.MODELS)
def test_left_padded_batch_generates_what_single_prompts_do(model: str) -> None:
    """Different lengths, no image, one image, two images; and the cache must not change anything."""
    texts = [
        "How do I make tea?",
        "<image>\nWhat is on the table?",
        "<image>\n<image>\nCompare the two pictures please.",
    ]
    texts = [f"USER: {text} ASSISTANT:" for text in texts]
    pictures = [image(name) for name in ("landscape.png", "square.png", "portrait.jpg")]
    groups = [[], pictures[:1], pictures[1:]]
    network, prepare = load(model), processor(model)
    batch = prepare(text=texts, images=pictures)
    together = network.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=-1)[:, -8:]
    for i, (text, group) in enumerate(zip(texts, groups, strict=True)):
        single = prepare(text=text, images=group)
        for use_cache in (True, False):
            alone = network.generate(**single, max_new_tokens=8, do_sample=False, eos_token_id=-1, use_cache=use_cache)
            assert alone[0, -8:].tolist() == together[i].tolist(), (text, use_cache)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_generation_with_beams_dict_output_and_repetition_penalty() -> None:
    """Image tokens (-200) must not reach transformers' logits processors, and prompts are repeated per sequence."""
    record = prompts("qwen2_siglip")[0]
    inputs = processor("qwen2_siglip")(text=record["prompt"], images=image(record["image"]))
    out = load("qwen2_siglip").generate(
        **inputs,
        max_new_tokens=4,
        num_beams=3,
        num_return_sequences=2,
        repetition_penalty=1.2,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    assert out.sequences.shape[0] == 2
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"].expand(2, -1))


def test_image_tokens_without_images_are_refused() -> None:
    ids = torch.full((1, 20), -200)
    with pytest.raises(ValueError, match="the prompt has 20 image tokens, but 0 images of 16 tokens need 0"):
        load("qwen2_siglip").generate(input_ids=ids, max_new_tokens=1)


def question_prefix(model: str) -> torch.Tensor:
    """Tokens in front of the image of case a's first sample."""
    row = golden.case(model, "a")["in.input_ids"][0].tolist()
    return torch.tensor(row[: row.index(-200)])


@pytest.mark.parametrize(
    ("model", "steps"), [("qwen2_siglip", "6,6,1"), ("qwen2_siglip", "10"), ("llama_clip", "6,6,1")]
)
def test_image_to_reconstruction_equals_golden(model: str, steps: str) -> None:
    """From pixels through tower, LLM, denoiser and auto-encoder: the recorded condition, sample and decoded picture."""
    run, data, network = golden.tensors(f"{model}/sampling.safetensors"), golden.case(model, "a"), load(model)
    hidden = network.image_hidden_states(question_prefix(model), data["in.images"])
    context = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]).transpose(1, 2).reshape(run["in.context"].shape)
    golden.assert_close(context, run["in.context"], golden.tolerance("hidden_states_max_over_maxabs"))
    latents = network.sample_latents(hidden, run["in.x_T"], lambda k: run["in.noise_bank"][k % 16], steps)
    key = "steps_" + steps.replace(",", "_")
    limit = 2 * golden.tolerance("sampling_max_over_maxabs")  # the recorded runs start from the recorded condition
    golden.assert_close(latents, run[f"{key}.z_0"], limit)
    if f"{key}.decoded" in run:
        decoded = network.latent_encoder.decode_latents(latents)
        golden.assert_close(decoded, run[f"{key}.decoded"], limit)


@pytest.mark.parametrize("model", golden.MODELS)
def test_training_prompt_is_what_golden_samples_have_before_the_image(model: str) -> None:
    prepare = processor(model)
    assert prepare.text_tokenizer.encode(prepare.text_before_image()) == question_prefix(model).tolist()


def test_reconstruct_depends_on_seed_and_image_but_not_on_batch_size() -> None:
    network = load("qwen2_siglip")
    pictures = [image(name) for name in ("landscape.png", "square.png", "portrait.jpg")]
    painted = network.reconstruct(pictures, steps="6,6,1", seed=5)
    assert [p.size for p in painted] == [(64, 64)] * 3
    one_by_one = network.reconstruct(pictures, steps="6,6,1", seed=5, batch_size=1)
    for a, b in zip(painted, one_by_one, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1
    other = network.reconstruct(pictures[:1], steps="6,6,1", seed=6)[0]
    assert np.asarray(other).tolist() != np.asarray(painted[0]).tolist()
    assert network.reconstruct([], steps=5) == []


def test_another_prompt_gives_another_picture() -> None:
    network = load("llama_clip")
    picture = [image("landscape.png")]
    default = network.reconstruct(picture, steps="6,6,1")[0]
    other = network.reconstruct(picture, steps="6,6,1", prompt="Look: ")[0]
    assert np.asarray(default).tolist() != np.asarray(other).tolist()


@pytest.mark.parametrize("model", golden.MODELS)
def test_auto_classes_find_the_models(model: str) -> None:
    folder = golden.checkpoint_dir(model)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(folder)).__name__ == CLASS_NAMES[model]
    assert AutoConfig.from_pretrained(folder).model_type == f"ross_{model.split('_')[0]}"


@pytest.mark.parametrize("model", golden.MODELS)
def test_saved_model_is_self_contained_and_equal(model: str, tmp_path: Path) -> None:
    load(model).save_pretrained(tmp_path)
    processor(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == golden.composite(model).keys()
    again = RossForConditionalGeneration.from_pretrained(tmp_path)
    for key, value in again.state_dict().items():
        assert torch.equal(value, golden.composite(model)[key]), key
    record = prompts(model)[0]
    inputs = RossProcessor.from_pretrained(tmp_path)(text=record["prompt"], images=image(record["image"]))
    out = again.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out[0, -4:].tolist() == record["generated"][:4]


def test_low_precision_keeps_the_reconstruction_in_float32() -> None:
    network = RossForConditionalGeneration.from_pretrained(golden.checkpoint_dir("qwen2_siglip"), dtype=torch.bfloat16)
    dtypes = {name.split(".")[1]: p.dtype for name, p in network.named_parameters() if name.startswith("model.")}
    assert dtypes["layers"] == dtypes["vision_tower"] == dtypes["mm_projector"] == torch.bfloat16
    assert dtypes["mm_inv_projector"] == dtypes["pixel_decoder"] == torch.float32
    assert network.reconstruct([image("square.png")], steps=2)[0].size == (64, 64)
    record = prompts("qwen2_siglip")[0]
    inputs = processor("qwen2_siglip")(text=record["prompt"], images=image(record["image"]))
    assert network.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_pipeline_answers_with_the_golden_tokens() -> None:
    record = prompts("llama_clip")[0]
    question = record["prompt"].split("<image>\n")[1].split(" ASSISTANT:")[0]
    content = [{"type": "image", "image": image(record["image"])}, {"type": "text", "text": question}]
    answer = pipeline("image-text-to-text", model=str(golden.checkpoint_dir("llama_clip")), device="cpu")(
        text=[{"role": "user", "content": content}], max_new_tokens=16, do_sample=False, return_full_text=False
    )[0]["generated_text"]
    expected = processor("llama_clip").decode(record["generated"], skip_special_tokens=True)
    assert answer.strip() == expected.strip()


def edit_tensors(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_left_over_tensors_are_listed(tmp_path: Path) -> None:
    folder = copy_checkpoint("qwen2_siglip", tmp_path)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.mm_inv_projector.net.blocks.1.mlp.fc1.bias"]
        tensors["model.extra.weight"] = torch.zeros(1)

    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match="does not fit its config") as error:
        RossForConditionalGeneration.from_pretrained(folder)
    assert "missing tensors: model.mm_inv_projector.net.blocks.1.mlp.fc1.bias" in str(error.value)
    assert "unexpected tensors: model.extra.weight" in str(error.value)


def test_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = copy_checkpoint("qwen2_siglip", tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({"model.mm_projector.0.weight": torch.zeros(64, 47)}))
    message = r"mismatched tensors: model\.mm_projector\.0\.weight \[64, 47\] \(the config makes it \[64, 48\]\)"
    with pytest.raises(ValueError, match=message):
        RossForConditionalGeneration.from_pretrained(folder)


def test_truncated_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = copy_checkpoint("qwen2_siglip", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        RossForConditionalGeneration.from_pretrained(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_config_paths_never_leave_the_checkpoint(tmp_path: Path) -> None:
    folder = copy_checkpoint("qwen2_siglip", tmp_path / "inner")
    shutil.copytree(golden.GOLDEN / "vision_siglip", tmp_path / "outside")
    edit_config(folder, mm_vision_tower="../../outside")
    with pytest.raises(ValueError, match=r"config of tower '../../outside' is unknown"):
        RossForConditionalGeneration.from_pretrained(folder)
    loaded = RossForConditionalGeneration.from_pretrained(folder, vision_tower=tmp_path / "outside")
    assert loaded.config.vision.image_size == 56


def test_plain_llava_composite_loads_and_cannot_reconstruct(tmp_path: Path) -> None:
    folder = copy_checkpoint("llama_clip", tmp_path)
    edit_config(folder, mm_inv_projector_type=None, mm_pixel_decoder=None)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "mm_inv_projector" in k or "pixel_decoder" in k]:
            del tensors[key]

    edit_tensors(folder, edit)
    network = RossForConditionalGeneration.from_pretrained(folder)
    assert isinstance(network, RossLlamaForCausalLM)
    with pytest.raises(ValueError, match="no denoiser and auto-encoder"):
        network.reconstruct([image("square.png")])


def test_other_checkpoints_and_missing_folders_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type"):
        RossForConditionalGeneration.from_pretrained(golden.GOLDEN / "llm_qwen2")
    with pytest.raises(ValueError, match="neither a folder nor a reachable hub id"):
        RossForConditionalGeneration.from_pretrained("no/such/folder")


def test_tied_embeddings_need_no_head_in_the_file(tmp_path: Path) -> None:
    folder = copy_checkpoint("qwen2_siglip", tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    network = RossForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(network.lm_head.weight, golden.composite("qwen2_siglip")["model.embed_tokens.weight"])
    network.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")


def test_a_denoiser_that_regresses_paints_in_one_pass_and_takes_no_steps(tmp_path: Path) -> None:
    folder = copy_checkpoint("qwen2_siglip", tmp_path)
    edit_config(folder, mm_inv_projector_objective="regress")
    network, pictures = RossForConditionalGeneration.from_pretrained(folder), [image("square.png")]
    prepare = processor("qwen2_siglip")
    painted = network.reconstruct(pictures, seed=1, processor=prepare)[0]
    assert np.array_equal(painted, network.reconstruct(pictures, seed=2, processor=prepare)[0])
    prefix = torch.tensor(prepare.text_tokenizer.encode(prepare.text_before_image()))
    hidden = network.image_hidden_states(prefix, prepare.pixels(pictures))
    nothing, t = torch.zeros(1, 1, 64, 4, 4), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        latents = network.model.mm_inv_projector["net"](nothing, t, hidden)[0]
    assert np.array_equal(painted, to_pil(network.latent_encoder.decode_latents(latents))[0])
    with pytest.raises(ValueError, match="gives latents in one pass"):
        network.reconstruct(pictures, steps="10", processor=prepare)
    with pytest.raises(ValueError, match="nothing is sampled"):
        network.sample_latents(hidden, nothing[0], lambda _: nothing[0], 10)
    network.save_pretrained(tmp_path / "saved")
    again = RossForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.denoiser.objective == "regress"


def test_an_unknown_objective_is_refused(tmp_path: Path) -> None:
    folder = copy_checkpoint("qwen2_siglip", tmp_path)
    edit_config(folder, mm_inv_projector_objective="guess")
    with pytest.raises(ValueError, match="mm_inv_projector_objective"):
        RossForConditionalGeneration.from_pretrained(folder)

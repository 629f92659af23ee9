"""What people start from: LLaVA in three formats, towers with processors and layers of their own, FLUX's own file."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.convert.component_config import tower_config
from megatron_ross.convert.fresh import fresh_denoiser
from megatron_ross.convert.importer import plan_checkpoint
from megatron_ross.convert.known_components import FLUX_VAE
from megatron_ross.convert.vae_source import current_name, open_vae, read_vae_config
from megatron_ross.data.images import ImageProcessor
from megatron_ross.evaluation.exports import exported_folder
from megatron_ross.evaluation.generate import load_for_inference
from megatron_ross.huggingface import RossForConditionalGeneration, RossProcessor
from megatron_ross.huggingface.chat_templates import chat_template
from megatron_ross.huggingface.configuration_ross import read_model_config
from tests.helpers.other_sizes import (
    LATENT_CHANNELS,
    build_vae,
    vae_config,
    write_llm,
    write_sparse_safetensors,
    write_tower,
    write_vae,
)


def _llava(folder: Path, tower: str = "siglip", family: str = "qwen2", **preprocessor: Any) -> Path:
    """A plain LLaVA of small components, as a Megatron checkpoint."""
    import_checkpoint(
        folder / "megatron",
        llm=str(write_llm(folder / "llm", family)),
        vision_tower=str(write_tower(folder / "tower", tower, **preprocessor)),
    )
    return folder / "megatron"


def _export(checkpoint: Path, output: Path, format_: Any) -> Path:
    export_checkpoint(checkpoint, output, format_, templates=chat_template)
    return output


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _edit(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(_config(folder) | changes))


def _tensors(reader: CheckpointReader, *prefixes: str) -> dict[str, Tensor]:
    return {key: reader.read(key) for key in reader.keys() if key.startswith(prefixes or "")}  # noqa: SIM118


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("format_", ["llava", "ross"])
def test_a_llava_becomes_ross(format_: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps every tensor, gets a denoiser from the seed and the auto-encoder's weights, and exports whole."""
    before = open_checkpoint(_llava(tmp_path))
    start = _export(tmp_path / "megatron", tmp_path / "start", format_)
    options: dict[str, Any] = {"denoiser_type": "denoiser_vit2x", "denoiser_width": 48, "seed": 5}
    vae = write_vae(tmp_path / "vae")
    import_checkpoint(tmp_path / "ross", checkpoint=str(start), vae=str(vae), **options)
    assert "note: start has no denoiser: added denoiser_vit2x, initialised from seed 5" in capsys.readouterr().out
    after = open_checkpoint(tmp_path / "ross")
    model = after.manifest.model
    assert model.denoiser is not None
    assert (model.denoiser.depth, model.denoiser.width) == (2, 48)
    assert _same(_tensors(after, "embedding", "decoder", "final", "output", "vision"), _tensors(before))
    fresh = {f"denoiser.{name.removeprefix('net.')}": tensor for name, tensor in fresh_denoiser(model, 5).items()}
    assert _same(_tensors(after, "denoiser."), fresh)
    stored = load_file(vae / "diffusion_pytorch_model.safetensors")
    assert _same(_tensors(after, "vae."), {f"vae.{name}": tensor for name, tensor in stored.items()})
    config = _config(_export(tmp_path / "ross", tmp_path / "out", "ross"))
    assert (config["mm_inv_hidden_size"], config["mm_pixel_decoder"]) == (4 * LATENT_CHANNELS, "vae")
    assert (config["ross_enable"], config["mm_inv_projector_type"]) == (True, "denoiser_vit2x")
    loaded = RossForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert len(loaded.reconstruct([Image.new("RGB", (60, 40), "red")], steps=2)) == 1


def test_denoiser_options_apply_to_a_new_denoiser_only(tmp_path: Path) -> None:
    start = _export(_llava(tmp_path), tmp_path / "start", "ross")
    with pytest.raises(ValueError, match=r"has no denoiser, and gets one only with --vae: --denoiser-type"):
        plan_checkpoint(str(start), denoiser_type="denoiser_vit8x")
    vae = str(write_vae(tmp_path / "vae"))
    import_checkpoint(tmp_path / "ross", checkpoint=str(start), vae=vae, denoiser_width=48)
    ross = str(_export(tmp_path / "ross", tmp_path / "out", "ross"))
    with pytest.raises(ValueError, match=r"has a denoiser already: --denoiser-type"):
        plan_checkpoint(ross, vae=vae, denoiser_width=64)
    with pytest.raises(ValueError, match="--projector-type do not apply"):
        import_checkpoint(tmp_path / "x", checkpoint=ross, projector_type="linear")


ORIGINAL = {
    "llava": ("llama", "clip", "LlavaLlamaForCausalLM"),
    "llava_llama": ("llama", "clip", "LlavaLlamaForCausalLM"),
    "llava_qwen": ("qwen2", "siglip", "LlavaQwenForCausalLM"),
}
NOT_IN_THE_ORIGINAL = ("image_", "ross_", "vision_config", "use_mm_inv", "decode_")


def _original(folder: Path, model_type: str, with_tower: bool) -> Path:
    """A checkpoint as LLaVA's own code saves it: a flat config, pickled shards, most often without the tower."""
    family, tower, architecture = ORIGINAL[model_type]
    _export(_llava(folder, tower, family), folder / "ross", "ross")
    target = folder / "original"
    target.mkdir()
    config = {k: v for k, v in _config(folder / "ross").items() if not k.startswith(NOT_IN_THE_ORIGINAL)}
    config |= {"model_type": model_type, "architectures": [architecture], "image_aspect_ratio": "pad"}
    config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "ross" / "model.safetensors")
    names = [name for name in tensors if with_tower or ".vision_tower." not in name]
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in shards.items():
        torch.save({name: tensors[name] for name in members}, target / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file in (folder / "llm").glob("*token*"):
        shutil.copy(file, target)
    if (folder / "llm" / "vocab.json").is_file():
        shutil.copy(folder / "llm" / "vocab.json", target)
    return target


@pytest.mark.parametrize("with_tower", [False, True])
@pytest.mark.parametrize("model_type", ORIGINAL)
def test_llava_in_its_original_format_is_imported(model_type: str, with_tower: bool, tmp_path: Path) -> None:
    original = _original(tmp_path, model_type, with_tower)
    import_checkpoint(tmp_path / "in", checkpoint=str(original), vision_tower=str(tmp_path / "tower"))
    before, after = open_checkpoint(tmp_path / "megatron"), open_checkpoint(tmp_path / "in")
    assert after.manifest.model == before.manifest.model
    assert _same(_tensors(after), _tensors(before))
    out = _export(tmp_path / "in", tmp_path / "out", "ross")
    assert _same(load_file(out / "model.safetensors"), load_file(tmp_path / "ross" / "model.safetensors"))
    assert (_config(out)["model_type"], _config(out)["ross_enable"]) == (f"ross_{ORIGINAL[model_type][0]}", False)


def test_an_original_llava_becomes_ross(tmp_path: Path) -> None:
    original = _original(tmp_path, "llava", with_tower=False)
    parts = {"vision_tower": str(tmp_path / "tower"), "vae": str(write_vae(tmp_path / "vae"))}
    import_checkpoint(tmp_path / "in", checkpoint=str(original), denoiser_width=48, **parts)
    sources = [source.part for source in open_checkpoint(tmp_path / "in").manifest.sources]
    assert sources == ["model", "vision", "vae"]
    config = _config(_export(tmp_path / "in", tmp_path / "out", "ross"))
    assert (config["mm_vision_tower"], config["mm_inv_hidden_size"]) == ("tower", 4 * LATENT_CHANNELS)


def test_a_tower_that_is_not_in_the_files_is_asked_for(tmp_path: Path) -> None:
    original = _original(tmp_path, "llava", with_tower=False)
    with pytest.raises(
        ValueError, match=r"does not hold .* tower: add --vision-tower openai/clip-vit-large-patch14-336"
    ):
        plan_checkpoint(str(original))
    _edit(original, mm_patch_merge_type="spatial_unpad")
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'spatial_unpad'"):
        plan_checkpoint(str(original), vision_tower=str(tmp_path / "tower"))


@pytest.mark.parametrize("model_type", ORIGINAL)
@pytest.mark.parametrize(
    "load",
    [
        load_for_inference,
        exported_folder,
        RossForConditionalGeneration.from_pretrained,
        RossProcessor.from_pretrained,
    ],
)
def test_tools_name_the_converter_before_anything_is_built(load: Any, model_type: str, tmp_path: Path) -> None:
    """The folder has no weights: whoever looked for them, or built a model of the default size, would say so."""
    tower = "openai/clip-vit-large-patch14-336"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "mm_vision_tower": tower}))
    command = f"megatron-ross import --checkpoint {re.escape(str(tmp_path))} --vision-tower {tower} --output"
    with pytest.raises(ValueError, match=f"in the format of the original code .*{command}") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format_", ["ross", "llava"])
def test_adapters_and_quantised_models_are_named_before_anything_is_built(format_: str, tmp_path: Path) -> None:
    folder = _export(_llava(tmp_path), tmp_path / "out", format_)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="unmerged PEFT model: merge it into its base model first"):
        load_for_inference(str(folder))
    _edit(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match=r"quantization_config \(method 'awq'\): quantised weights are not read"):
        load_for_inference(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a LoRA adapter \(adapter_config.json\)"):
        load_for_inference(str(folder))


def test_a_tower_that_is_not_needed_is_said_to_be(tmp_path: Path) -> None:
    llava = _export(_llava(tmp_path), tmp_path / "llava", "llava")
    plan = plan_checkpoint(str(llava), vision_tower=str(tmp_path / "tower"))
    assert plan.notes == ["llava has its own vision tower: --vision-tower is not used"]


@pytest.mark.parametrize(("tower", "layer"), [("siglip", -1), ("siglip", 2), ("clip", -1), ("clip", -4)])
def test_another_tower_layer_survives_every_round_trip(tower: str, layer: int, tmp_path: Path) -> None:
    llava = _export(_llava(tmp_path, tower), tmp_path / "llava", "llava")
    _edit(llava, vision_feature_layer=layer)
    import_checkpoint(tmp_path / "in", checkpoint=str(llava))
    ross = _export(tmp_path / "in", tmp_path / "ross", "ross")
    named = "The published code reads SigLIP at layer -2" in (ross / "README.md").read_text()
    assert named == (tower == "siglip")
    RossForConditionalGeneration.from_pretrained(ross).save_pretrained(tmp_path / "saved")
    assert read_model_config(tmp_path / "saved").vision.select_layer == layer
    import_checkpoint(tmp_path / "again", checkpoint=str(ross))
    again = _export(tmp_path / "again", tmp_path / "back", "llava")
    for root in ("in", "again"):
        assert open_checkpoint(tmp_path / root).manifest.model.vision.select_layer == layer
    assert _config(again)["vision_feature_layer"] == layer
    assert _config(_export(tmp_path / "again", tmp_path / "ross2", "ross")) == _config(ross)


def test_a_layer_that_the_published_code_ignores_is_named(tmp_path: Path) -> None:
    ross = _export(_llava(tmp_path), tmp_path / "ross", "ross")
    assert plan_checkpoint(str(ross)).notes == []
    _edit(ross, mm_vision_select_layer=-1)
    plan = plan_checkpoint(str(ross))
    assert plan.model.vision.select_layer == -2
    assert plan.notes == ["mm_vision_select_layer is -1, but layer -2 is used: the published code fixes it for SigLIP"]
    _edit(ross, mm_vision_select_layer=4)  # of six hidden states: the same layer
    assert plan_checkpoint(str(ross)).notes == []


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "bilinear": ("siglip", {"resample": 2}),
    "lanczos": ("clip", {"resample": 1}),
    "siglip that crops": (
        "siglip",
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 42}, "crop_size": 42},
    ),
    "clip that stretches": ("clip", {"do_center_crop": False, "size": {"height": 42, "width": 42}, "crop_size": None}),
    "clip with both": ("clip", {"size": {"height": 42, "width": 42}}),
    "old siglip": ("siglip", {"size": 42}),
    "old clip": ("clip", {"size": 42, "crop_size": 42, "image_processor_type": None}),
}


def _picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (71, 131, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((113, 90), Image.Resampling.BOX)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_towers_own_processor_is_honoured(name: str, tmp_path: Path) -> None:
    """The pixels are those of the tower's own processor, in every format and after every trip."""
    tower, changes = PROCESSORS[name]
    _llava(tmp_path, tower, **changes)
    stored = json.loads((tmp_path / "tower" / "preprocessor_config.json").read_text())
    is_clip = "CLIP" in (stored.get("image_processor_type") or "CLIP")
    official = (CLIPImageProcessorPil if is_clip else SiglipImageProcessorPil).from_pretrained(tmp_path / "tower")
    if name == "old siglip":  # today's class takes a number for the shorter side, the one of its time for both
        official = SiglipImageProcessorPil.from_pretrained(tmp_path / "tower", size={"height": 42, "width": 42})
    vision = open_checkpoint(tmp_path / "megatron").manifest.model.vision
    picture = _picture()
    expected = official(picture, return_tensors="pt")["pixel_values"][0]
    ours = ImageProcessor.from_config(vision.shown("square", None))
    assert (ours(picture) - expected).abs().max() < 1e-5
    for format_ in ("ross", "llava"):
        folder = _export(tmp_path / "megatron", tmp_path / format_, format_)
        import_checkpoint(tmp_path / f"from_{format_}", checkpoint=str(folder))
        assert open_checkpoint(tmp_path / f"from_{format_}").manifest.model.vision == vision
    (tmp_path / "ross" / "preprocessor_config.json").unlink()
    processor = RossProcessor.from_pretrained(tmp_path / "ross")
    assert torch.equal(processor.pixels([picture])[0], ImageProcessor.from_config(vision)(picture))
    processor.save_pretrained(tmp_path / "saved")
    assert RossProcessor.from_pretrained(tmp_path / "saved").image_transform == processor.image_transform


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("siglip", {"resample": 0}, "resample is 0, it must be one of 1, 2, 3"),
        ("siglip", {"size": {"height": 84, "width": 84}}, r"size is .*84.*, but the tower takes 42 x 42"),
        ("siglip", {"size": {"height": 42, "width": 84}}, "size is .*84.*, but the tower takes 42 x 42"),
        ("clip", {"size": {"shortest_edge": 48}}, "size is .*48.*, but the tower takes 42 x 42"),
        ("clip", {"crop_size": {"height": 36, "width": 36}}, "crop_size is .*36.*, but the tower takes 42 x 42"),
        ("clip", {"do_center_crop": False}, r"size is \{'shortest_edge': 42\}, but"),
        ("clip", {"size": {"longest_edge": 42}}, r"size is \{'longest_edge': 42\}, but"),
        ("siglip", {"do_normalize": False}, "do_normalize is False"),
        ("siglip", {"do_resize": False}, "do_resize is False"),
        ("siglip", {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078.*, it must be 1/255"),
        ("siglip", {"image_mean": [0.5, 0.5]}, "image_mean is .*, it must be 3 numbers"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(
    tower: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}"):
        tower_config(write_tower(tmp_path / "tower", tower, **changes))


def test_a_checkpoint_that_was_trained_against_its_file_stays_as_it_is(tmp_path: Path) -> None:
    """Earlier versions resized every picture bicubically; what such a manifest says holds, whatever the file says."""
    root = _llava(tmp_path)
    vision = open_checkpoint(root).manifest.model.vision
    file = open_checkpoint(root).assets / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resample": 2}))
    manifest = Manifest.read(resolve_checkpoint(root))
    replace(manifest, files={}).write(resolve_checkpoint(root))
    ross = _export(root, tmp_path / "ross", "ross")
    assert read_model_config(ross).vision == vision
    assert _config(ross)["image_resample"] == "bicubic"


def test_statistics_in_two_files_must_agree(tmp_path: Path) -> None:
    ross = _export(_llava(tmp_path), tmp_path / "ross", "ross")
    _edit(ross, image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"image_mean and image_std are \(\(0.5, 0.5, 0.5\).*make them equal"):
        plan_checkpoint(str(ross))


def _original_name(name: str, blocks: int) -> str:
    """Name that FLUX's own file gives a tensor of a diffusers auto-encoder."""
    side, rest = name.split(".", 1)
    if side not in ("encoder", "decoder"):
        return name
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets\.(\d)|(?:down|up)samplers\.0)\.(.*)", rest)
    if match:
        way, block, _, layer, tail = match.groups()
        number = int(block) if way == "down" else blocks - 1 - int(block)
        kind = f"{way}sample" if layer is None else f"block.{layer}"
        return f"{side}.{way}.{number}.{kind}.{tail.replace('conv_shortcut', 'nin_shortcut')}"
    parts = {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_q": "mid.attn_1.q",
        "mid_block.attentions.0.to_k": "mid.attn_1.k",
        "mid_block.attentions.0.to_v": "mid.attn_1.v",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "conv_norm_out": "norm_out",
    }
    for ours, theirs in parts.items():
        if rest.startswith(ours + "."):
            return f"{side}.{theirs}.{rest.removeprefix(ours + '.')}"
    return name


def _write_original_vae(folder: Path, vae: AutoencoderKL) -> Path:
    """`ae.safetensors` of an auto-encoder, with the attention's projections as 1x1 convolutions."""
    folder.mkdir()
    blocks = len(vae.config.block_out_channels)
    tensors = {_original_name(name, blocks): tensor.clone() for name, tensor in vae.state_dict().items()}
    for name in tensors:
        if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight", name):
            tensors[name] = tensors[name][:, :, None, None].clone()
    save_file(tensors, folder / "ae.safetensors")
    return folder / "ae.safetensors"


def test_names_of_flux_own_file_are_those_of_its_code(tmp_path: Path) -> None:
    """diffusers' own conversion of such files, at full size, gives what ours gives."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = {name: value for name, value in FLUX_VAE.items() if not name.startswith("_")}
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    shapes = {_original_name(name, 4): tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    shapes = {n: (*s, 1, 1) if ".attn_1." in n and len(s) == 2 else s for n, s in shapes.items()}
    theirs = convert_ldm_vae_checkpoint({n: torch.empty(s, device="meta") for n, s in shapes.items()}, config)
    write_sparse_safetensors(tmp_path / "ae.safetensors", shapes)
    ours = open_vae(tmp_path / "ae.safetensors")
    assert {name: info.shape for name, info in ours.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()
    }
    assert theirs.keys() == ours.tensors.keys()
    assert read_vae_config(tmp_path / "ae.safetensors").hf_config == FLUX_VAE
    assert read_vae_config(tmp_path).hf_config == FLUX_VAE


def test_flux_own_file_is_imported(tmp_path: Path) -> None:
    """The imported auto-encoder gives the moments and the pictures of the one that was written in that format."""
    vae = build_vae(use_quant_conv=True, use_post_quant_conv=True, layers_per_block=2)
    config = vae_config(use_quant_conv=True, use_post_quant_conv=True, layers_per_block=2)
    file = _write_original_vae(tmp_path / "flux", vae)
    with pytest.raises(ValueError, match=r"not FLUX.1's .*latent_channels 6.*config.json as --vae"):
        read_vae_config(file)
    (tmp_path / "flux" / "config.json").write_text(json.dumps(config))
    import_checkpoint(
        tmp_path / "in",
        llm=str(write_llm(tmp_path / "llm")),
        vision_tower=str(write_tower(tmp_path / "tower")),
        vae=str(tmp_path / "flux"),
        denoiser_width=48,
    )
    reader = open_checkpoint(tmp_path / "in")
    read = AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    read.load_state_dict({k.removeprefix("vae."): v for k, v in _tensors(reader, "vae.").items()}, strict=True)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        moments = [each.encode(pixels).latent_dist.parameters for each in (vae, read)]
        pictures = [each.decode(moments[0][:, :LATENT_CHANNELS]).sample for each in (vae, read)]
    assert torch.equal(*moments)
    assert torch.equal(*pictures)
    source = next(source for source in reader.manifest.sources if source.part == "vae")
    assert list(source.files) == ["config.json", "ae.safetensors"]


def test_what_is_no_auto_encoder_is_called_so(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2)}, tmp_path / "flux1-dev.safetensors")
    with pytest.raises(ValueError, match=r"flux1-dev\.safetensors holds no auto-encoder in FLUX's own .*decoder\.up"):
        read_vae_config(tmp_path / "flux1-dev.safetensors")


def test_old_diffusers_names_of_the_attention() -> None:
    prefix = "encoder.mid_block.attentions.0."
    old = ("query.weight", "key.bias", "value.weight", "proj_attn.bias", "group_norm.weight")
    new = ("to_q.weight", "to_k.bias", "to_v.weight", "to_out.0.bias", "group_norm.weight")
    assert [current_name(prefix + name) for name in old] == [prefix + name for name in new]

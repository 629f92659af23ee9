"""The published checkpoint, with nothing else given: its config with every field at full size, and the same in small.

No number of the small models is one of the golden models or equals another: the width of the language model is not the
denoiser's number of channels.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.config.model import RossModelConfig, VaeConfig
from megatron_ross.convert import composite_config, read_off
from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.convert.composite_config import ross_model_config
from megatron_ross.convert.importer import plan_checkpoint
from megatron_ross.convert.known_components import FLUX_VAE, KNOWN_TOWERS
from megatron_ross.convert.layouts import ross_mappings
from megatron_ross.convert.published_config import published_config
from megatron_ross.huggingface import RossForConditionalGeneration
from megatron_ross.huggingface.configuration_ross import RossQwen2Config
from megatron_ross.huggingface.modeling_ross import RossQwen2ForCausalLM
from tests.helpers import golden
from tests.helpers.other_sizes import (
    LATENT_CHANNELS,
    LLM_WIDTH,
    write_llm,
    write_sparse_safetensors,
    write_tower,
    write_vae,
)
from tests.helpers.other_sizes import vae_config as small_vae_config
from tests.helpers.published_contract import PublishedModule, published_shapes

PUBLISHED_7B: dict[str, Any] = {
    "_name_or_path": "Qwen/Qwen2-7B-Instruct",
    "architectures": ["RossQwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decode_image_size": 432,
    "eos_token_id": 151645,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "pad",
    "image_embed_len": 729,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_inv_hidden_size": 64,
    "mm_inv_projector_lr": None,
    "mm_inv_projector_type": "denoiser_vit3x",
    "mm_patch_merge_type": "flat",
    "mm_pixel_decoder": "./pretrained_vae",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": None,
    "model_type": "ross_qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "ross_enable": True,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_inv_proj": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""config.json of HaochenWang/ross-qwen2-7b."""

OUR_FIELDS = ("vision_config", "vae_config", "mm_inv_projector_width")
SIGLIP = KNOWN_TOWERS["siglip-so400m-patch14-384"]


def _listing(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the published code has written for a golden composite."""
    lines = (golden.GOLDEN / f"ross_{name}.state_dict.txt").read_text().splitlines()
    rows = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return {row[0]: tuple(json.loads(row[1])) for row in rows}


@pytest.mark.parametrize("name", golden.MODELS)
def test_the_contract_is_what_the_published_code_writes(name: str) -> None:
    read = {
        part: json.loads((golden.GOLDEN / folder / "config.json").read_text())
        for part, folder in (("all", f"ross_{name}"), ("tower", f"vision_{name.split('_')[1]}"), ("vae", "vae"))
    }
    assert published_shapes(read["all"], read["tower"], read["vae"], width=64) == _listing(name)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released folder at full size: all 17 GB of it are a hole in the disk."""
    folder = tmp_path_factory.mktemp("published") / "ross-qwen2-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED_7B))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden.GOLDEN / "llm_qwen2" / name, folder)
    write_sparse_safetensors(folder / "model.safetensors", published_shapes(PUBLISHED_7B, SIGLIP, FLUX_VAE))
    return folder


def test_the_published_config_and_tensors_are_enough(published: Path) -> None:
    """All fields, all tensors, no network, and no --vae or --vision-tower."""
    plan = plan_checkpoint(str(published))
    model = plan.model
    assert model.vae is not None
    assert model.denoiser is not None
    assert (model.vae.hf_config, model.vae.denoiser_channels) == (FLUX_VAE, 64)
    assert (model.denoiser.width, model.language.hidden_size, model.vision.select_layer) == (1024, 3584, -2)
    assert plan.tensors["denoiser.x_embedder.proj.weight"].shape == (1024, 64, 1, 1)
    assert plan.tensors["denoiser.z_embedder.1.weight"].shape == (1024, 3584)
    assert plan.notes == []


def test_a_tower_with_a_private_name_is_recognised_by_its_tensors(published: Path) -> None:
    config = PUBLISHED_7B | {"mm_vision_tower": "./pretrained_siglip"}
    assert ross_model_config(config, published) == ross_model_config(PUBLISHED_7B, published)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_inv_hidden_size": 3584}, "mm_inv_hidden_size is 3584, but the parts make it 64"),
        ({"mm_inv_hidden_size": 32}, "mm_inv_hidden_size is 32, but the parts make it 64"),
        ({"mm_pixel_decoder": "stabilityai/stable-diffusion-3-medium"}, "give its folder or hub id with --vae"),
        ({"mm_vision_tower": "google/siglip2-so400m-patch14-384"}, "give its folder or hub id with --vision-tower"),
        ({"mm_inv_projector_type": "linear"}, "denoiser type 'linear' is unknown"),
    ],
)
def test_what_cannot_be_read_off_is_asked_for(published: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ross_model_config(PUBLISHED_7B | changes, published)


def _manifest(model: RossModelConfig) -> Manifest:
    return Manifest(iteration=0, model=model, sources=(), dtypes={}, training={})


def test_the_published_config_comes_back_with_every_field(published: Path, tmp_path: Path) -> None:
    model = ross_model_config(PUBLISHED_7B, published)
    (tmp_path / "source_config.json").write_text(json.dumps(PUBLISHED_7B))
    config = published_config(_manifest(model), tmp_path, "bfloat16")
    assert {name: value for name, value in config.items() if name not in OUR_FIELDS} == PUBLISHED_7B
    assert set(config) == {*PUBLISHED_7B, *OUR_FIELDS}
    assert ross_model_config(config, tmp_path) == model


def test_our_class_has_the_published_tensors_at_full_size(published: Path) -> None:
    """What generate, evaluate and reconstruct build, on the meta device, and the converter's table."""
    model = ross_model_config(PUBLISHED_7B, published)
    config = RossQwen2Config(**PUBLISHED_7B)
    config.resolve(model)
    with torch.device("meta"):
        built = RossQwen2ForCausalLM(config)
    contract = published_shapes(PUBLISHED_7B, SIGLIP, FLUX_VAE)
    assert {part.name: part.shape for row in ross_mappings(model) for part in row.parts} == contract
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == contract
    PublishedModule(contract, "meta").load_state_dict(built.state_dict(), strict=True)


def _small(folder: Path, tower: str = "siglip", family: str = "qwen2") -> Path:
    """A composite made of components, as a Megatron checkpoint."""
    import_checkpoint(
        folder / "megatron",
        llm=str(write_llm(folder / "llm", family)),
        vision_tower=str(write_tower(folder / "tower", tower)),
        vae=str(write_vae(folder / "vae")),
        denoiser_type="denoiser_vit2x",
        denoiser_width=48,
    )
    return folder / "megatron"


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("tower", "family"), [("siglip", "qwen2"), ("clip", "llama")])
def test_exports_fit_the_published_contract(tower: str, family: str, tmp_path: Path) -> None:
    """config.json alone, as the published code reads it, gives every name and shape of the export."""
    export_checkpoint(_small(tmp_path, tower, family), tmp_path / "hf", "ross")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["mm_inv_hidden_size"], config["hidden_size"]) == (4 * LATENT_CHANNELS, LLM_WIDTH)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    read = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("tower", "vae"))
    contract = published_shapes(config, *read, width=48)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == contract
    PublishedModule(contract).load_state_dict(tensors, strict=True)


@pytest.fixture
def small_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the small tower and auto-encoder public components, so that their tensors identify them."""
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 40,
        "image_size": 42,
        "intermediate_size": 72,
        "num_attention_heads": 5,
        "num_hidden_layers": 5,
        "patch_size": 6,
    }
    monkeypatch.setattr(read_off, "KNOWN_TOWERS", {"small": tower})
    monkeypatch.setattr(read_off, "TOWERS_KNOWN_BY_SHAPE", ("small",))
    monkeypatch.setattr(read_off, "FLUX_VAE", small_vae_config())


def _as_published(exported: Path, folder: Path) -> Path:
    """The export without what the published code does not write, and with names that lead nowhere."""
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in OUR_FIELDS}
    config |= {"mm_pixel_decoder": "./pretrained_vae", "mm_vision_tower": "./pretrained_siglip"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("preprocessor_config.json", "processor_config.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.usefixtures("small_are_known")
def test_a_published_folder_goes_through_bit_for_bit(tmp_path: Path) -> None:
    """Import with nothing else given, export, and the classes behind generate, evaluate and reconstruct."""
    export_checkpoint(_small(tmp_path), tmp_path / "hf", "ross")
    published = _as_published(tmp_path / "hf", tmp_path / "published")
    import_checkpoint(tmp_path / "again", checkpoint=str(published))
    model = open_checkpoint(tmp_path / "again").manifest.model
    assert model == replace(open_checkpoint(tmp_path / "megatron").manifest.model, vae=VaeConfig(small_vae_config()))
    export_checkpoint(tmp_path / "again", tmp_path / "back", "ross")
    stored = load_file(published / "model.safetensors")
    assert _equal(load_file(tmp_path / "back" / "model.safetensors"), stored)
    first, back = (json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path / "back"))
    assert {name: value for name, value in back.items() if name not in OUR_FIELDS} == first
    loaded = RossForConditionalGeneration.from_pretrained(published)
    assert loaded.config.vae is not None
    assert loaded.config.vae.hf_config == small_vae_config()
    assert _equal(dict(loaded.state_dict()), stored)


def test_early_exports_of_ours_still_load(tmp_path: Path) -> None:
    """They hold the language model's width in `mm_inv_hidden_size`; what comes out again is right."""
    export_checkpoint(_small(tmp_path), tmp_path / "hf", "ross")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"mm_inv_hidden_size": LLM_WIDTH}))
    import_checkpoint(tmp_path / "again", checkpoint=str(tmp_path / "hf"))
    assert RossForConditionalGeneration.from_pretrained(tmp_path / "hf").config.denoiser.width == 48
    export_checkpoint(tmp_path / "again", tmp_path / "back", "ross")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    with pytest.raises(ValueError, match=f"mm_inv_hidden_size is 40, but the parts make it {4 * LATENT_CHANNELS}"):
        ross_model_config(config | {"mm_inv_hidden_size": 40}, tmp_path)


def test_unknown_components_are_described_and_asked_for(tmp_path: Path) -> None:
    export_checkpoint(_small(tmp_path), tmp_path / "hf", "ross")
    published = _as_published(tmp_path / "hf", tmp_path / "published")
    with pytest.raises(ValueError, match=r"hidden_size 40, .*num_patches 49\) are no known tower's.*--vision-tower"):
        plan_checkpoint(str(published))
    with pytest.raises(ValueError, match=r"block_out_channels \[8, 12, 20, 20\], .*latent_channels 6.*with --vae"):
        plan_checkpoint(str(published), vision_tower=str(tmp_path / "tower"))
    plan = plan_checkpoint(str(published), vision_tower=str(tmp_path / "tower"), vae=str(tmp_path / "vae"))
    assert plan.model == open_checkpoint(tmp_path / "megatron").manifest.model


def test_every_known_tower_is_found_by_its_tensors() -> None:
    """Where two public towers had equal sizes, the wrong heads or activation could come back."""
    for name in read_off.TOWERS_KNOWN_BY_SHAPE:
        tower = composite_config.KNOWN_TOWERS[name]
        shapes = {n: s for n, s in published_shapes(PUBLISHED_7B, tower, FLUX_VAE).items() if ".vision_model." in n}
        below = {n.split(".vision_model.")[1]: s for n, s in shapes.items()}
        assert read_off.known_tower(read_off.tower_sizes(below)) == tower

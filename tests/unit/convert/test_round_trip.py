"""Golden checkpoints -> Megatron -> Hugging Face: every tensor bit for bit, published names, fields and files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.convert.exporter import export_ross
from megatron_ross.convert.torch_dist_writer import LazyTensor, write_torch_dist

Imported = Callable[[str], Path]
NAMES = ["qwen2_siglip", "llama_clip"]
OUR_FIELDS = {"vision_config", "vae_config", "mm_inv_projector_width", "auto_map"}


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def _listing(path: Path) -> list[tuple[str, str, str]]:
    """(key, shape, dtype) lines of a golden state-dict listing."""
    lines = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [(name, shape, dtype) for name, shape, dtype in lines]


@pytest.mark.parametrize("name", NAMES)
def test_composite_round_trip_is_exact(name: str, imported: Imported, golden_dir: Path, tmp_path: Path) -> None:
    export_checkpoint(imported(name), tmp_path / "out", "ross")
    source = golden_dir / f"ross_{name}"
    assert _equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors"))
    config, published = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", source))
    assert {key: value for key, value in config.items() if key not in OUR_FIELDS} == published
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors", "tokenizer_config.json"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    settings, published = (json.loads((d / "tokenizer_config.json").read_text()) for d in (tmp_path / "out", source))
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    assert settings == published | inputs | {"padding_side": "left"}


@pytest.mark.parametrize("name", NAMES)
def test_export_has_the_published_names_shapes_and_dtypes(
    name: str, imported: Imported, golden_dir: Path, tmp_path: Path
) -> None:
    export_checkpoint(imported(name), tmp_path / "out", "ross")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    contract = _listing(golden_dir / f"ross_{name}.state_dict.txt")
    assert len(contract) == len(tensors)
    for key, shape, dtype in contract:
        assert (str(list(tensors[key].shape)), str(tensors[key].dtype)) == (shape, f"torch.{dtype}"), key


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_self_contained(name: str, imported: Imported, tmp_path: Path) -> None:
    """Our own exports need no --vision-tower or --vae to come back, and come back equal."""
    export_checkpoint(imported(name), tmp_path / "out", "ross")
    import_checkpoint(tmp_path / "again", checkpoint=str(tmp_path / "out"))
    first, again = open_checkpoint(imported(name)), open_checkpoint(tmp_path / "again")
    assert again.manifest.model == first.manifest.model
    assert again.keys() == first.keys()
    assert all(torch.equal(again.read(key), first.read(key)) for key in first.keys())  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_adapter_files_are_the_published_ones(name: str, imported: Imported, golden_dir: Path, tmp_path: Path) -> None:
    export_checkpoint(imported(name), tmp_path / "out", "adapters")
    golden = load_file(golden_dir / f"ross_{name}" / "model.safetensors")
    lines = (golden_dir / f"ross_{name}.state_dict.txt").read_text().splitlines()
    for file in ("mm_projector.bin", "mm_inv_projector.bin"):
        listed = [line.split("\t")[1] for line in lines if line.startswith(f"# {file}\t")]
        tensors = torch.load(tmp_path / "out" / file, weights_only=True)
        assert list(tensors) == listed
        assert _equal(tensors, {key: golden[key] for key in listed})


def test_components_and_adapters_make_the_same_checkpoint(imported: Imported, golden_dir: Path, tmp_path: Path) -> None:
    """The golden parts and the adapters of the golden composite give the composite, tensor for tensor."""
    composite = load_file(golden_dir / "ross_qwen2_siglip" / "model.safetensors")
    llm = {
        k: v for k, v in composite.items() if k.startswith(("model.layers.", "model.embed", "model.norm", "lm_head"))
    }
    shutil.copytree(golden_dir / "llm_qwen2", tmp_path / "llm")
    save_file(llm, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    export_checkpoint(imported("qwen2_siglip"), tmp_path / "adapters", "adapters")
    import_checkpoint(
        tmp_path / "out",
        llm=str(tmp_path / "llm"),
        vision_tower=str(golden_dir / "vision_siglip"),
        vae=str(golden_dir / "vae"),
        mm_projector=tmp_path / "adapters" / "mm_projector.bin",
        mm_inv_projector=tmp_path / "adapters" / "mm_inv_projector.bin",
    )
    whole, parts = open_checkpoint(imported("qwen2_siglip")), open_checkpoint(tmp_path / "out")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts.read(key), whole.read(key)) for key in whole.keys())  # noqa: SIM118
    assert parts.manifest.model.denoiser == whole.manifest.model.denoiser
    assert [source.part for source in parts.manifest.sources] == ["language", "vision", "vae", "projector", "denoiser"]


def test_fresh_adapters_depend_on_the_seed_only(golden_dir: Path, tmp_path: Path) -> None:
    def convert(name: str, seed: int) -> dict[str, torch.Tensor]:
        import_checkpoint(
            tmp_path / name,
            llm=str(golden_dir / "llm_vicuna"),
            vision_tower=str(golden_dir / "vision_clip"),
            vae=str(golden_dir / "vae"),
            denoiser_width=64,
            seed=seed,
        )
        reader = open_checkpoint(tmp_path / name)
        return {k: reader.read(k) for k in reader.keys() if k.startswith(("denoiser.", "vision.projector."))}  # noqa: SIM118

    first, same, other = convert("a", 1), convert("b", 1), convert("c", 2)
    assert _equal(first, same)
    assert not torch.equal(first["denoiser.z_embedder.1.weight"], other["denoiser.z_embedder.1.weight"])
    assert not torch.equal(first["vision.projector.0.weight"], other["vision.projector.0.weight"])
    assert torch.equal(first["denoiser.pos_embed"], other["denoiser.pos_embed"])
    assert not first["denoiser.final_layer.linear.weight"].any()


def test_components_export_as_published_composite(golden_dir: Path, tmp_path: Path) -> None:
    """From components, config.json has every published field with the published value of these components."""
    import_checkpoint(
        tmp_path / "in",
        llm=str(golden_dir / "llm_qwen2"),
        vision_tower=str(golden_dir / "vision_siglip"),
        vae=str(golden_dir / "vae"),
        denoiser_width=64,
    )
    export_checkpoint(tmp_path / "in", tmp_path / "out", "ross")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published = json.loads((golden_dir / "ross_qwen2_siglip" / "config.json").read_text())
    length = "tokenizer_model_max_length"  # of a training run, which this checkpoint has not seen
    assert {k: config.get(k) for k in published if k != length} == {k: v for k, v in published.items() if k != length}
    llm = load_file(golden_dir / "llm_qwen2" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], llm[name]) for name in llm)


def test_without_vae_the_model_is_plain_llava(golden_dir: Path, tmp_path: Path) -> None:
    import_checkpoint(
        tmp_path / "in", llm=str(golden_dir / "llm_qwen2"), vision_tower=str(golden_dir / "vision_siglip")
    )
    reader = open_checkpoint(tmp_path / "in")
    assert reader.manifest.model.denoiser is None
    assert not [key for key in reader.keys() if key.startswith(("denoiser.", "vae."))]  # noqa: SIM118
    export_checkpoint(tmp_path / "in", tmp_path / "out", "ross")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["ross_enable"] is False
    assert "mm_pixel_decoder" not in config
    import_checkpoint(tmp_path / "again", checkpoint=str(tmp_path / "out"))
    assert open_checkpoint(tmp_path / "again").manifest.model == reader.manifest.model


def test_tied_embeddings_are_stored_once_and_come_back(golden_dir: Path, golden_llm_copy: Path, tmp_path: Path) -> None:
    """A tied model may store its head or not; a head that differs from the embedding is an error."""
    config = json.loads((golden_llm_copy / "config.json").read_text())
    (golden_llm_copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = golden_llm_copy / "model.safetensors"
    tensors = load_file(weights)
    arguments = {"llm": str(golden_llm_copy), "vision_tower": str(golden_dir / "vision_siglip")}
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        import_checkpoint(tmp_path / "bad", **arguments)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights, {"format": "pt"})
    import_checkpoint(tmp_path / "tied", **arguments)
    assert "output_layer.weight" not in open_checkpoint(tmp_path / "tied").keys()  # noqa: SIM118
    export_checkpoint(tmp_path / "tied", tmp_path / "out", "ross")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_pickled_and_sharded_sources_give_the_same_tensors(
    golden_dir: Path, golden_llm_copy: Path, tmp_path: Path
) -> None:
    """pytorch_model.bin shards with an index, with the frequency tables that old checkpoints store."""
    tensors = load_file(golden_llm_copy / "model.safetensors")
    (golden_llm_copy / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in shards.items():
        torch.save({name: tensors[name] for name in members}, golden_llm_copy / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (golden_llm_copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    import_checkpoint(tmp_path / "in", llm=str(golden_llm_copy), vision_tower=str(golden_dir / "vision_siglip"))
    export_checkpoint(tmp_path / "in", tmp_path / "out", "ross")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[n], t) for n, t in tensors.items() if not n.endswith("inv_freq"))


def test_shards_and_index(imported: Imported, golden_dir: Path, tmp_path: Path) -> None:
    """Small shards: none above the limit, the index names every tensor, and transformers' layout reads back equal."""
    export_ross(open_checkpoint(imported("qwen2_siglip")), tmp_path / "out", max_shard_bytes=400_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        shard = load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 400_000
        assert all(index["weight_map"][name] == file for name in shard)
        loaded |= shard
    assert _equal(loaded, load_file(golden_dir / "ross_qwen2_siglip" / "model.safetensors"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.values())


def test_dtype_option_casts_and_says_so(imported: Imported, golden_dir: Path, tmp_path: Path) -> None:
    export_checkpoint(imported("llama_clip"), tmp_path / "out", "ross", dtype="bfloat16")
    golden = load_file(golden_dir / "ross_llama_clip" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert _equal(exported, {name: tensor.bfloat16() for name, tensor in golden.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_manifest_records_where_everything_came_from(imported: Imported, golden_dir: Path) -> None:
    import hashlib

    manifest = Manifest.read(resolve_checkpoint(imported("qwen2_siglip")))
    (source,) = manifest.sources
    weights = golden_dir / "ross_qwen2_siglip" / "model.safetensors"
    assert source.name == "ross_qwen2_siglip"
    assert source.files["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert set(manifest.dtypes.values()) == {"float32"}
    assert "torch" in manifest.versions


def _partial(directory: Path, source: CheckpointReader, tensors: dict[str, torch.Tensor], base: Path) -> None:
    """A training checkpoint that holds `tensors` only; the rest is in `base`."""
    directory.mkdir(parents=True)
    lazy = {key: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.clone) for key, tensor in tensors.items()}
    write_torch_dist(directory, lazy)
    replace(source.manifest, iteration=5, base=str(base), training={"lm_loss": 1.25, "settings": {"steps": 5}}).write(
        directory
    )


def test_stage_1_checkpoint_with_trained_weights_only(imported: Imported, golden_dir: Path, tmp_path: Path) -> None:
    """Trained adapters come from the upper checkpoint, everything else from its base; the card tells the training."""
    base = open_checkpoint(imported("qwen2_siglip"))
    keys = [key for key in base.keys() if key.startswith(("denoiser.", "vision.projector."))]  # noqa: SIM118
    trained = {key: base.read(key) + 1 for key in keys}
    _partial(tmp_path / "iter_0000005", base, trained, imported("qwen2_siglip"))
    export_checkpoint(tmp_path / "iter_0000005", tmp_path / "out", "ross")
    export_checkpoint(tmp_path / "iter_0000005", tmp_path / "adapters", "adapters")
    golden = load_file(golden_dir / "ross_qwen2_siglip" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in golden.items():
        is_trained = name.startswith(("model.mm_projector.", "model.mm_inv_projector."))
        assert torch.equal(exported[name], tensor + 1 if is_trained else tensor), name
    adapter = torch.load(tmp_path / "adapters" / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(tensor, golden[name] + 1) for name, tensor in adapter.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- lm_loss: 1.25" in card
    assert "  - steps: 5" in card


def test_vocabulary_padding_is_cut_off(imported: Imported, golden_dir: Path, tmp_path: Path) -> None:
    """Training pads the vocabulary for tensor parallelism; exports do not show it."""
    base = open_checkpoint(imported("llama_clip"))
    padding = torch.full((24, 64), 7.0)
    padded = {
        key: torch.cat([base.read(key), padding]) for key in ("embedding.word_embeddings.weight", "output_layer.weight")
    }
    _partial(tmp_path / "iter_0000005", base, padded, imported("llama_clip"))
    export_checkpoint(tmp_path / "iter_0000005", tmp_path / "out", "ross")
    golden = load_file(golden_dir / "ross_llama_clip" / "model.safetensors")
    assert _equal(load_file(tmp_path / "out" / "model.safetensors"), golden)


def test_a_denoiser_that_regresses_says_so_all_the_way(imported: Imported, tmp_path: Path) -> None:
    """Manifest -> config.json -> manifest; adapter files cannot say it and are refused."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(resolve_checkpoint(imported("qwen2_siglip")), checkpoint)
    manifest = Manifest.read(checkpoint)
    assert manifest.model.denoiser is not None
    regresses = replace(manifest.model, denoiser=replace(manifest.model.denoiser, objective="regress"))
    replace(manifest, model=regresses).write(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "out", "ross")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_inv_projector_objective"] == "regress"
    import_checkpoint(tmp_path / "again", checkpoint=str(tmp_path / "out"))
    assert open_checkpoint(tmp_path / "again").manifest.model == regresses
    with pytest.raises(ValueError, match="adapter files would be taken for one that denoises"):
        export_checkpoint(checkpoint, tmp_path / "adapters", "adapters")

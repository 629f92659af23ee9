"""Hub sources: which files are fetched, and what happens without network."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ross.convert import sources
from megatron_ross.convert.sources import check_tokenizer, resolve_source, source_name, wanted_files

FLUX = [
    "flux1-dev.safetensors",
    "ae.safetensors",
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
VICUNA = [
    "README.md",
    "config.json",
    "generation_config.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
    "pytorch_model.bin.index.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def test_only_the_auto_encoder_of_a_pipeline_is_fetched() -> None:
    assert wanted_files(FLUX, "vae", weights=True) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert wanted_files(FLUX, "vae", weights=False) == ["vae/config.json"]


def test_pickles_are_fetched_only_without_safetensors() -> None:
    assert set(wanted_files(VICUNA, None, weights=True)) == set(VICUNA) - {"README.md"}
    both = [*VICUNA, "model.safetensors"]
    assert [name for name in wanted_files(both, None, weights=True) if name.endswith((".bin", ".safetensors"))] == [
        "model.safetensors"
    ]


def test_code_and_other_formats_are_never_fetched() -> None:
    files = ["config.json", "modeling_x.py", "model.safetensors", "flax_model.msgpack", "onnx/model.onnx", "setup.sh"]
    assert wanted_files(files, None, weights=True) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="neither safetensors nor"):
        wanted_files(["config.json", "flax_model.msgpack"], None, weights=True)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    monkeypatch.setattr(sources, "unreachable_hub", lambda: "")
    monkeypatch.setattr(sources, "list_repo_files", lambda name: FLUX)
    monkeypatch.setattr(sources, "snapshot_download", download)
    assert resolve_source("owner/flux", subfolder="vae") == tmp_path / "vae"
    assert asked["allow_patterns"] == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert source_name("owner/flux") == "owner/flux"


@pytest.mark.parametrize("found_out", ["before", "while listing"])
def test_without_network_the_cache_is_used(found_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_files(name: str) -> list[str]:
        assert found_out == "while listing"
        raise ConnectionError("no network")

    def download(name: str, local_files_only: bool = False) -> str:
        assert local_files_only
        return str(tmp_path)

    monkeypatch.setattr(sources, "unreachable_hub", lambda: "no network" if found_out == "before" else "")
    monkeypatch.setattr(sources, "list_repo_files", list_files)
    monkeypatch.setattr(sources, "snapshot_download", download)
    assert resolve_source("owner/name") == tmp_path


def test_sentencepiece_only_tokenizers_are_checked(golden_dir: Path, tmp_path: Path) -> None:
    """Vicuna's repository has no tokenizer.json."""
    (tmp_path / "tokenizer.model").write_bytes((golden_dir / "llm_vicuna" / "tokenizer.model").read_bytes())
    check_tokenizer(tmp_path, 576)
    with pytest.raises(ValueError, match="largest id is 575, but vocab_size is 575"):
        check_tokenizer(tmp_path, 575)


def test_local_names_do_not_give_away_the_path(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert source_name(str(tmp_path / "my-model")) == "my-model"

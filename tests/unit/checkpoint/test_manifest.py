"""Manifest files: exact round trip, finding the newest iteration, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ross.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    Source,
    iteration_dir,
    library_versions,
    resolve_checkpoint,
    write_latest,
)
from megatron_ross.config.model import LanguageModelConfig, RossModelConfig, VisionConfig


@pytest.fixture
def manifest() -> Manifest:
    language = LanguageModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=32,
        max_position_embeddings=64,
        rotary_base=10000.0,
        layernorm_epsilon=1e-5,
        add_qkv_bias=False,
        share_embeddings_and_output_weights=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    )
    vision = VisionConfig({"model_type": "clip_vision_model", "hidden_size": 4}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return Manifest(
        iteration=7,
        model=RossModelConfig(language, vision),
        sources=(Source("language", "owner/name", {"model.safetensors": "00ff"}),),
        dtypes={"language": "bfloat16"},
        training={"steps": 7, "losses": {"lm": 1.5}},
        base="../../base",
    )


def test_round_trip(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_resolve_takes_the_root_or_the_iteration(manifest: Manifest, tmp_path: Path) -> None:
    for iteration in (5, 10):
        iteration_dir(tmp_path, iteration).mkdir()
        manifest.write(iteration_dir(tmp_path, iteration))
    write_latest(tmp_path, 5)
    assert resolve_checkpoint(tmp_path) == tmp_path / "iter_0000005"
    write_latest(tmp_path, 10)
    assert resolve_checkpoint(str(tmp_path)) == tmp_path / "iter_0000010"
    assert resolve_checkpoint(tmp_path / "iter_0000005") == tmp_path / "iter_0000005"


def test_a_root_without_a_complete_iteration_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint"):
        resolve_checkpoint(tmp_path)
    write_latest(tmp_path, 3)
    with pytest.raises(ValueError, match="names iteration 3"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(ValueError, match="should hold an iteration number, found 'release'"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version 99"),
        ({"surprise": 1}, "surprise"),
        ({"model": {"language": {}}}, "not a Megatron-Ross manifest"),
    ],
)
def test_foreign_manifests_are_refused(
    manifest: Manifest, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    manifest.write(tmp_path)
    path = tmp_path / MANIFEST_NAME
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        Manifest.read(tmp_path)


def test_damaged_manifests_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing"):
        Manifest.read(tmp_path)
    manifest.write(tmp_path)
    path = tmp_path / MANIFEST_NAME
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="not valid JSON"):
        Manifest.read(tmp_path)


def test_a_changed_digit_is_found(manifest: Manifest, tmp_path: Path) -> None:
    """It leaves a manifest that is fine in every other way."""
    manifest.write(tmp_path)
    path = tmp_path / MANIFEST_NAME
    text = path.read_text()
    path.write_text(text.replace('"lm": 1.5', '"lm": 1.7'))
    with pytest.raises(ValueError, match=r"manifest\.json: is damaged: its sha256 is not that of its other fields"):
        Manifest.read(tmp_path)
    path.write_text(text.replace('"sha256"', '"sha257"'))
    with pytest.raises(ValueError, match="unexpected keyword argument 'sha257'"):
        Manifest.read(tmp_path)


def test_a_manifest_without_a_checksum_of_its_own_is_read(manifest: Manifest, tmp_path: Path) -> None:
    """As they were written before; spelling does not matter to the checksum of those that have one."""
    manifest.write(tmp_path)
    path = tmp_path / MANIFEST_NAME
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(fields.items()))))
    assert Manifest.read(tmp_path) == manifest
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    assert Manifest.read(tmp_path) == manifest


def test_versions_name_what_determines_the_format() -> None:
    import torch

    # The wheel of the package index leaves the CUDA version out of its own version.
    assert torch.__version__.startswith(library_versions()["torch"])
    assert "megatron-core" in library_versions()

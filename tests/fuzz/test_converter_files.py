"""What the converters read: configs, weights and tokenizers of strangers. Nothing is allocated for what they claim."""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model_limits import check_model
from megatron_ross.convert.component_config import image_statistics, language_config, vae_config, vision_config
from megatron_ross.convert.composite_config import ross_model_config
from megatron_ross.convert.hf_io import SafetensorsFile, WeightFolder, load_torch_tensors
from megatron_ross.convert.importer import load_adapter
from megatron_ross.convert.sources import check_tokenizer
from tests.helpers.hostile import ABSURD, Trap, at_most, attempt, json_values, nested_json

pytestmark = pytest.mark.usefixtures("little_memory")

MEAN = (0.5, 0.5, 0.5)


def _read(golden_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((golden_dir / name / "config.json").read_text())


def _refused_or_bounded(action: Any, *args: Any) -> None:
    with at_most(16):
        config, message = attempt(ValueError, action, *args)
    assert config is not None or "where" in message or "config.json" in message
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["llm_qwen2", "llm_vicuna", "vision_clip", "vision_siglip", "vae"])
def test_absurd_values_of_every_field_of_a_component(name: str, golden_dir: Path) -> None:
    values = _read(golden_dir, name)
    action = {"l": language_config, "v": lambda v, w: vision_config(v, w, MEAN, MEAN)}[name[0]]
    action = vae_config if name == "vae" else action
    for field in values:
        for value in ABSURD:
            _refused_or_bounded(action, values | {field: value}, "where")


@pytest.mark.parametrize("name", ["ross_qwen2_siglip", "ross_llama_clip"])
def test_absurd_values_of_every_field_of_a_whole_model(name: str, golden_dir: Path) -> None:
    values = _read(golden_dir, name)
    folders = {"vision_dir": golden_dir / f"vision_{name.split('_')[2]}", "vae_dir": golden_dir / "vae"}

    def read(config: dict[str, Any]) -> Any:
        model = ross_model_config(config, golden_dir / name, **folders)
        check_model(model)
        return model

    assert read(values) is not None
    for field in values:
        for value in ABSURD:
            _refused_or_bounded(read, values | {field: value})


@given(values=st.dictionaries(st.sampled_from(["model_type", "hidden_size", "rope_scaling"]), json_values("factor")))
def test_configs_of_any_shape(values: dict[str, Any]) -> None:
    for action in (language_config, vae_config, image_statistics, lambda v, w: vision_config(v, w, MEAN, MEAN)):
        _refused_or_bounded(action, values, "where")


@pytest.mark.parametrize("factor", ["x", None, -1, 10**400, float("nan"), [1]])
def test_rope_factors(factor: Any, golden_dir: Path) -> None:
    values = _read(golden_dir, "llm_vicuna") | {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    config, message = attempt(ValueError, language_config, values, "where")
    assert (config is not None and factor is None) or "rope_scaling" in message


@pytest.mark.parametrize("text", [nested_json(200_000), '{"a": ' + "1" * 5000 + "}", "[]", '{"a": "\xff"}', "\0"])
def test_json_files_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|should hold a JSON object)"):
        read_json(tmp_path / "config.json")


def test_long_json_files_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10 << 30)
    with at_most(1), pytest.raises(ValueError, match="has 10,737,418,240 bytes, too many for a JSON file"):
        read_json(tmp_path / "config.json")


GOOD = save({"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.float16)})


def _safetensors(header: str | bytes, data: bytes = b"\0" * 48, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: Any, begin: int, end: int, dtype: str = "F32") -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}})


HEADERS = {
    "length of exabytes": _safetensors("{}", length=2**63),
    "length beyond the file": _safetensors("{}", length=10**6),
    "offsets beyond the file": _safetensors(_entry([10**15], 0, 4 * 10**15)),
    "shape larger than its data": _safetensors(_entry([2**40, 2**40], 0, 48)),
    "shape that overflows": _safetensors(_entry([2**62, 2**62, 4], 0, 48)),
    "negative shape": _safetensors(_entry([-12], 0, 48)),
    "offsets backwards": _safetensors(_entry([12], 48, 0)),
    "offsets negative": _safetensors(_entry([12], -48, 0)),
    "text as shape": _safetensors(_entry("12", 0, 48)),
    "gap": _safetensors(_entry([1], 40, 44)),
    "two claims on one tensor": _safetensors(_entry([12], 0, 48)[:-1] + ", " + _entry([10**12], 0, 4 * 10**12)[1:]),
    "two offsets of one tensor": _safetensors(_entry([12], 0, 48)[:-2] + ', "data_offsets": [0, 4000000000000]}}'),
    "deep": _safetensors(nested_json(100_000)),
    "empty": b"",
    "cut": GOOD[:40],
    "longer than it says": GOOD + b"\0" * 100,
    "unknown dtype": _safetensors(_entry([48], 0, 48, "F8_E4M3")),
}


@pytest.mark.parametrize("header", HEADERS)
def test_safetensors_headers_that_lie(header: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[header])
    with at_most(8), pytest.raises(ValueError, match=r"model\.safetensors"):
        WeightFolder(tmp_path)


@given(changes=st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4))
def test_safetensors_with_changed_bytes(changes: list[tuple[int, bytes]], tmp_path: Path) -> None:
    data = bytearray(GOOD)
    for place, piece in changes:
        data[place : place + len(piece)] = piece
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with at_most(8):
        folder, message = attempt(ValueError, WeightFolder, tmp_path)
        assert "model.safetensors" in message if folder is None else folder.tensors is not None
        for name, info in folder.tensors.items() if folder is not None else ():
            assert folder.read(name).shape == info.shape
            assert math.prod(info.shape) * info.dtype.itemsize <= len(data)


def test_safetensors_without_a_lie_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert torch.equal(SafetensorsFile(tmp_path / "model.safetensors").read("a"), torch.ones(3, 4))


def _repacked(source: Path, target: Path, part: str, data: bytes | None) -> None:
    """A torch file with its parts compressed, and one of them replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            replaced = data is not None and info.filename.endswith(part)
            new.writestr(info.filename, data if replaced and data is not None else old.read(info.filename))


@pytest.mark.parametrize("megabytes", [0, 256])
def test_torch_files_that_unfold_are_refused(megabytes: int, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "plain.bin")
    bomb = b"\0" * (megabytes << 20) or None
    _repacked(tmp_path / "plain.bin", tmp_path / "pytorch_model.bin", "data.pkl", bomb)
    with at_most(8), pytest.raises(ValueError, match=r"pytorch_model\.bin.* is compressed, as torch never writes it"):
        load_torch_tensors(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_torch_files_is_not_run(legacy: bool, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.0.weight": Trap(trap)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"mm_projector\.bin is not a readable torch file"):
        load_adapter(path, "mm_projector.")
    path.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match=r"mm_projector\.bin is not a readable torch file"):
        load_adapter(path, "mm_projector.")
    assert not trap.exists()


def test_tensors_that_repeat_a_number_are_refused(tmp_path: Path) -> None:
    """A petabyte in a file of a kilobyte."""
    torch.save({"a": torch.ones(1).expand(10**12, 1000)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"a repeats its data to fill the shape \[1000000000000, 1000\]"):
        WeightFolder(tmp_path)


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02\x8a\x0a"]))
def test_torch_files_of_any_bytes(data: bytes, start: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(start + data)
    tensors, message = attempt(ValueError, load_torch_tensors, tmp_path / "pytorch_model.bin")
    assert tensors == {} or "pytorch_model.bin" in message


INDICES = ['{"weight_map": {"a": "../b.bin"}}', '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": 3}}',
           '{"weight_map": {"a": [1]}}', '{"weight_map": {"a": 3, "b": "c"}}', "[]", "{}", nested_json(100_000),
           '{"weight_map": {"a": "b\\u0000.bin"}}', '{"weight_map": {"a": "' + "x" * 5000 + '.bin"}}']  # fmt: skip


@pytest.mark.parametrize("text", INDICES, ids=range(len(INDICES)))
def test_weight_indices_that_point_elsewhere(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json (names|is not an index|is not valid JSON|should hold)"):
        WeightFolder(tmp_path)


@given(content=json_values("model", "vocab", "added_tokens", "added_tokens_decoder", "id"))
def test_tokenizer_files_of_any_shape(content: Any, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps(content))
        _, message = attempt(ValueError, check_tokenizer, tmp_path, 100)
        assert len(message) < 2000
        (tmp_path / name).unlink()

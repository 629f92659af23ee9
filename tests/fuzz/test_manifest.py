"""Manifests of any shape: a model within bounds, or one message that names the file; nothing is built from the rest."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ross.checkpoint.manifest import LATEST_NAME, MANIFEST_NAME, Manifest, Source, resolve_checkpoint
from megatron_ross.config.model_limits import check_model
from megatron_ross.convert.known_models import known_model
from tests.helpers.hostile import ABSURD, at_most, attempt, json_values, nested_json

GOOD = Manifest(
    iteration=7,
    model=known_model("qwen2-7b+siglip-so400m"),
    sources=(Source("language", "owner/name", {"model.safetensors": "00ff"}),),
    dtypes={"language": "bfloat16"},
    training={"steps": 7},
    base="../../base",
)
KEYS = ("format_version", "model", "language", "vision", "hf_config", "sources", "iteration", "base", "num_layers")


def _fields() -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(GOOD)))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _paths(part, (*path, key)))]


def _replaced(place: tuple[Any, ...], value: Any) -> Any:
    fields = _fields()
    target = fields
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = copy.deepcopy(value)
    return fields


PLACES = [place for place in _paths(_fields()) if place]
FREE = {"training"}
"""The trainer's own record: nothing is built from it."""


def _read(text: str | bytes, folder: Path) -> Manifest | None:
    """What a program gets; None if it is refused with one line that names the file."""
    path = folder / MANIFEST_NAME
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    with at_most(64):
        manifest, message = attempt(ValueError, Manifest.read, folder)
    if manifest is None:
        assert message.startswith(str(path))
        assert len(message) < 1000
        return None
    check_model(manifest.model)
    return manifest


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_absurd_values_at_every_place(place: tuple[Any, ...], tmp_path: Path) -> None:
    """10 ** 18 is no size of anything, and no other kind of value stands where a number did."""
    for value in ABSURD:
        if isinstance(value, int) and value.bit_length() > 10_000:
            continue
        manifest = _read(json.dumps(_replaced(place, value)), tmp_path)
        is_size = isinstance(_at(place), int | float) and not isinstance(_at(place), bool)
        if is_size and place[0] not in FREE and "sample_size" not in place:
            assert manifest is None or value is None or -1e6 <= value <= 1e12


def _at(place: tuple[Any, ...]) -> Any:
    value: Any = _fields()
    for key in place:
        value = value[key]
    return value


@given(seed=st.integers(0, 2**32), value=json_values(*KEYS))
def test_any_value_at_any_place(seed: int, value: Any, tmp_path: Path) -> None:
    _read(json.dumps(_replaced(random.Random(seed).choice(PLACES), value)), tmp_path)


@given(value=json_values(*KEYS))
def test_documents_of_any_shape(value: Any, tmp_path: Path) -> None:
    assert _read(json.dumps(value), tmp_path) is None


@given(data=st.binary(max_size=100))
def test_any_bytes(data: bytes, tmp_path: Path) -> None:
    assert _read(data, tmp_path) is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "language", "vocab_size"), 10**15, "language.vocab_size is 1000000000000000, it must be an integer"),
        (("model", "language", "num_layers"), -1, "language.num_layers is -1, it must be an integer from 1 to 1024"),
        (("model", "language", "hidden_size"), "8", "language.hidden_size is '8'"),
        (("model", "language", "hidden_size"), True, "language.hidden_size is True"),
        (("model", "language", "layernorm_epsilon"), float("nan"), "language.layernorm_epsilon is nan"),
        (
            ("model", "language", "rope_scaling"),
            {"rope_type": "linear", "factor": "9" * 99},
            "rope_scaling.factor is",
        ),
        (("model", "vision", "hf_config", "image_size"), 10**6, "vision.hf_config.image_size is 1000000"),
        (("model", "vision", "hf_config", "auto_map"), {}, "vision.hf_config.auto_map may name code"),
        (("model", "vision", "hf_config", "_attn_implementation"), "a/b", "may name code to fetch and run"),
        (("model", "vision", "image_mean"), [0.5] * 1000, "vision.image_mean is .* it must be three numbers"),
        (("model", "projector", "type"), "mlp999999999x_gelu", "projector.type is 'mlp999999999x_gelu'"),
        (("model", "denoiser", "depth"), 10**9, "denoiser.depth is 1000000000"),
        (("model", "vae", "hf_config", "block_out_channels"), [10**9], "block_out_channels is 1000000000"),
        (("model", "vae"), None, "denoiser and vae come together"),
        (("iteration",), -5, "iteration is -5, it must be a whole number"),
        (("base",), "a\0b", "base is .* it must be a path or null"),
        (("sources",), {"a": 1}, "not a Megatron-Ross manifest"),
        (("format_version",), 10**400, "has format_version a number with thousands of digits"),
    ],
)
def test_messages_name_the_field(place: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(_replaced(place, value)))
    with pytest.raises(ValueError, match=message):
        Manifest.read(tmp_path)


def test_deep_and_long_manifests_are_refused(tmp_path: Path) -> None:
    assert _read(nested_json(200_000), tmp_path) is None
    assert _read('{"iteration": ' + "1" * 5000 + "}", tmp_path) is None
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(ValueError, match="has 10,737,418,240 bytes, too many for a JSON file"):
        Manifest.read(tmp_path)


def test_a_manifest_that_is_fine_is_read(tmp_path: Path) -> None:
    assert _read(json.dumps(_fields()), tmp_path) == GOOD


@pytest.mark.parametrize("text", ["", "-1", "1" * 5000, "../../x", "٣", "1\n2", "\0", "release"])
def test_what_names_the_latest_iteration_is_a_number(text: str, tmp_path: Path) -> None:
    (tmp_path / LATEST_NAME).write_text(text)
    with pytest.raises(ValueError, match="should hold an iteration number, found"):
        resolve_checkpoint(tmp_path)

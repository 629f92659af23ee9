"""Vision tower against recorded features; layer selection, freezing, empty input, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModel

from megatron_ross.models.vision import VisionTower
from tests.helpers import golden


def load(model: str, select_layer: int = -2) -> VisionTower:
    config = dataclasses.replace(golden.model_config(model).vision, select_layer=select_layer)
    tower = VisionTower(config)
    tower.tower.load_state_dict(golden.part(model, "vision"))
    return tower


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("letter", ["a", "b", "c"])
def test_features_equal_golden(model: str, letter: str) -> None:
    data = golden.case(model, letter)
    features = load(model)(data["in.images"])
    golden.assert_close(features, data["out.vision_features"], golden.tolerance("hidden_states_max_over_maxabs"))


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("select_layer", [-1, -2, -3, -4, -5, 0, 3, 4])
def test_selection_follows_hidden_states_of_transformers(model: str, select_layer: int) -> None:
    folder = golden.GOLDEN / golden.metadata()["models"][model]["vision_tower"]
    reference = AutoModel.from_pretrained(folder)
    pixels = golden.case(model, "a")["in.images"]
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[select_layer]
    tower = load(model, select_layer)
    tower.tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in reference.state_dict().items()})
    torch.testing.assert_close(tower(pixels), expected[:, -16:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", golden.MODELS)
def test_frozen_tower_records_no_graph_and_runs_no_further_than_needed(model: str) -> None:
    tower = load(model)
    ran: list[int] = []
    for i, block in enumerate(tower.tower.encoder.layers):
        block.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    features = tower(golden.case(model, "a")["in.images"].requires_grad_(False))
    assert not features.requires_grad
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("model", golden.MODELS)
def test_trainable_tower_gets_gradients_exactly_where_it_runs(model: str) -> None:
    tower = load(model)
    tower.set_trainable(True)
    tower(golden.case(model, "a")["in.images"]).square().mean().backward()
    for name, parameter in tower.named_parameters():
        runs = not any(part in name for part in (".layers.3.", "post_layernorm", ".head."))
        assert parameter.requires_grad is runs, name
        assert (parameter.grad is not None) is runs, name
    tower.set_trainable(False)
    assert not tower(golden.case(model, "a")["in.images"]).requires_grad


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("trainable", [False, True])
def test_no_images(model: str, trainable: bool) -> None:
    tower = load(model)
    tower.set_trainable(trainable)
    out = tower(torch.zeros(0, 3, 56, 56))
    assert out.shape == (0, 16, 48)
    if trainable:
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in tower.parameters() if p.requires_grad)


@pytest.mark.parametrize("select_layer", [-6, 5])
def test_missing_layer_is_refused(select_layer: int) -> None:
    with pytest.raises(ValueError, match=rf"select_layer {select_layer} is out of range: the tower has 4 blocks"):
        load("qwen2_siglip", select_layer)


def test_unknown_family_is_refused() -> None:
    config = golden.model_config("qwen2_siglip").vision
    with pytest.raises(ValueError, match="'dinov2' is not supported"):
        VisionTower(dataclasses.replace(config, hf_config={**config.hf_config, "model_type": "dinov2"}))

"""Projector against recorded image embeddings; published names of every type; refusals."""

from __future__ import annotations

import pytest
import torch

from megatron_ross.config.model import ProjectorConfig
from megatron_ross.models.projector import build_projector
from tests.helpers import golden


@pytest.mark.parametrize("model", golden.MODELS)
def test_image_embeddings_equal_golden(model: str) -> None:
    config = golden.model_config(model)
    projector = build_projector(config.projector, config.vision.hidden_size, config.language.hidden_size)
    projector.load_state_dict(golden.part(model, "projector"))
    data = golden.case(model, "a")
    out = projector(data["out.vision_features"])
    golden.assert_close(out, data["out.image_embeds"], golden.tolerance("hidden_states_max_over_maxabs"))


@pytest.mark.parametrize(
    ("projector_type", "names"),
    [
        ("identity", []),
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_published_names(projector_type: str, names: list[str]) -> None:
    projector = build_projector(ProjectorConfig(projector_type), 16, 16)
    assert list(projector.state_dict()) == names
    assert projector(torch.zeros(0, 5, 16)).shape == (0, 5, 16)


@pytest.mark.parametrize("bad", ["mlp2x_relu", "mlp0x_gelu", "mlpx_gelu", "perceiver", ""])
def test_unknown_type_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="unknown projector type"):
        build_projector(ProjectorConfig(bad), 16, 16)


def test_identity_between_different_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="the vision tower has 16 and the LLM 32"):
        build_projector(ProjectorConfig("identity"), 16, 32)

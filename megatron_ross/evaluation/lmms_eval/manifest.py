"""What lmms-eval finds through the entry point `lmms_eval.models` (setup.py)."""

from __future__ import annotations

from typing import Any

MODEL_ID = "megatron_ross"


def manifest() -> Any:
    """Names of the two model classes; lmms-eval imports the one it wants."""
    from lmms_eval.models.registry_v2 import ModelManifest

    package = "megatron_ross.evaluation.lmms_eval"
    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{package}.simple.MegatronRoss",
        chat_class_path=f"{package}.chat.MegatronRossChat",
    )

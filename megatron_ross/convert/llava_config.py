"""Config files of a `LlavaForConditionalGeneration` export: model, image processor, processor and generation.

They are written as plain JSON with fields that transformers 4 and 5, vLLM and SGLang read.
"""

from __future__ import annotations

from typing import Any

from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.config.model import RossModelConfig, VisionConfig
from megatron_ross.convert.preprocessor import PILLOW_FILTERS
from megatron_ross.convert.published_config import language_fields

_TEXT_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
PILLOW_FILE = "image_processing_pillow.py"
PILLOW_PROCESSOR = '''\
"""LLaVA's image processor with Pillow, as in training, whether torchvision is there or not: trust_remote_code=True."""

try:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as PillowProcessor
except ImportError:  # transformers 4
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor as PillowProcessor


class LlavaImageProcessorPillow(PillowProcessor):
    """transformers' own; without torchvision it is what loads anyway."""
'''
IMAGE_TOKEN = "<image>"


def select_strategy(vision: VisionConfig) -> str:
    """`default` drops CLIP's class token; SigLIP has none, so `full` takes everything."""
    return "default" if vision.model_type == "clip_vision_model" else "full"


def llava_config(manifest: Manifest, token_ids: dict[str, Any], image_token_id: int, dtype: str) -> dict[str, Any]:
    """config.json.

    Args:
        manifest: of the checkpoint.
        token_ids: bos_token_id, eos_token_id, pad_token_id.
        image_token_id: id of `<image>`; the vocabulary is extended to hold it.
        dtype: dtype name of the written tensors.
    """
    model = manifest.model
    text = language_fields(model.language) | token_ids
    text["model_type"] = model.language.family
    text["architectures"] = [_TEXT_ARCHITECTURES[model.language.family]]
    text["vocab_size"] = max(model.language.vocab_size, image_token_id + 1)
    text["torch_dtype"] = dtype
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": model.vision.hf_config,
        "image_token_index": image_token_id,
        "image_seq_length": model.vision.num_image_tokens,
        "image_aspect_ratio": model.vision.image_aspect_ratio,
        "image_conversion": model.vision.image_conversion,  # read by this project; stock processors know one way only
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": model.vision.select_layer,
        "vision_feature_select_strategy": select_strategy(model.vision),
        "tie_word_embeddings": model.language.share_embeddings_and_output_weights,
        "torch_dtype": dtype,
        **token_ids,
        "ross": {"iteration": manifest.iteration, "training": manifest.training, "versions": manifest.versions},
    }


def image_processor_config(model: RossModelConfig) -> dict[str, Any]:
    """preprocessor_config.json: `LlavaImageProcessor`, whose padding equals the published one bit for bit."""
    side = model.vision.image_size
    crops = model.vision.crops
    return {
        "image_processor_type": "LlavaImageProcessor",
        "auto_map": {"AutoImageProcessor": PILLOW_FILE.replace(".py", ".LlavaImageProcessorPillow")},
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": model.vision.image_aspect_ratio == "pad",
        "do_resize": True,
        "size": {"shortest_edge": side} if crops else {"height": side, "width": side},
        "resample": PILLOW_FILTERS[model.vision.resample],
        "do_center_crop": crops,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.vision.image_mean),
        "image_std": list(model.vision.image_std),
    }


def processor_config(model: RossModelConfig) -> dict[str, Any]:
    """processor_config.json of `LlavaProcessor`."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": model.vision.patch_size,
        "vision_feature_select_strategy": select_strategy(model.vision),
        "num_additional_image_tokens": int(model.vision.model_type == "clip_vision_model"),
    }


def generation_config(token_ids: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """generation_config.json: greedy, and never the image token."""
    return {**token_ids, "do_sample": False, "suppress_tokens": [image_token_id]}

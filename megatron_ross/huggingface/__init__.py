"""Ross models in transformers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from megatron_ross.huggingface.configuration_ross import RossLlamaConfig, RossQwen2Config
from megatron_ross.huggingface.modeling_ross import (
    RossForConditionalGeneration,
    RossLlamaForCausalLM,
    RossQwen2ForCausalLM,
)
from megatron_ross.huggingface.processing_ross import RossProcessor

for _config, _model in ((RossQwen2Config, RossQwen2ForCausalLM), (RossLlamaConfig, RossLlamaForCausalLM)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _model)
    AutoModelForImageTextToText.register(_config, _model)
    AutoProcessor.register(_config, RossProcessor)

__all__ = [
    "RossForConditionalGeneration",
    "RossLlamaConfig",
    "RossLlamaForCausalLM",
    "RossProcessor",
    "RossQwen2Config",
    "RossQwen2ForCausalLM",
]

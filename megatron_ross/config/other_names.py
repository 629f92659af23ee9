"""What other training programs call a setting, for the answer to a flag that there is not here."""

from __future__ import annotations

_MODEL = "the checkpoint defines the model (init_from, or load)"
_MODEL_SETTINGS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention kv_channels
    max_position_embeddings vocab_size padded_vocab_size make_vocab_size_divisible_by normalization norm_epsilon swiglu
    rotary_base rotary_percent use_rotary_position_embeddings position_embedding_type add_qkv_bias disable_bias_linear
    add_bias_linear untie_embeddings_and_output_weights hidden_dropout attention_dropout tokenizer_type tokenizer_model
    tokenizer_name vocab_file merge_file vision_tower mm_projector_type mm_vision_select_layer mm_inv_projector_type
    mm_pixel_decoder image_size img_h img_w patch_dim torch_dtype
"""
_NAMES = {
    # Megatron-LM
    "train_samples": "give train_iters or num_epochs",
    "pretrained_checkpoint": "it is called init_from",
    "finetune": "init_from takes the weights only, load resumes",
    "tensorboard_dir": "tensorboard writes to the run folder, save",
    "lr_warmup_samples": "give lr_warmup_fraction or lr_warmup_iters",
    "lr_decay_iters": "the schedule ends with the run (train_iters or num_epochs)",
    "num_layers_per_virtual_pipeline_stage": "give virtual_pipeline_model_parallel_size, or write the stages as layout",
    "pipeline_model_parallel_layout": "it is called layout",
    "use_distributed_optimizer": "optimizer states are always distributed",
    "fp16": "training is in bf16 or fp32; set bf16",
    "split": "valid_split is the share held out for validation",
    "dataloader_type": "the order is a shuffle, or group_by_modality_length",
    "exit_signal_handler": "SIGTERM and SIGUSR1 always save and end the run",
    "recompute_activations": "set recompute_granularity: selective",
    # transformers, and LLaVA's scripts
    "model_name_or_path": "it is called init_from",
    "output_dir": "it is called save",
    "resume_from_checkpoint": "it is called load",
    "learning_rate": "it is called lr",
    "per_device_train_batch_size": "it is called micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size says how many samples a step has",
    "num_train_epochs": "it is called num_epochs",
    "max_steps": "it is called train_iters",
    "warmup_ratio": "it is called lr_warmup_fraction",
    "warmup_steps": "it is called lr_warmup_iters",
    "lr_scheduler_type": "it is called lr_decay_style",
    "max_grad_norm": "it is called clip_grad",
    "model_max_length": "it is called seq_length",
    "save_steps": "it is called save_interval",
    "save_total_limit": "it is called save_retain_last",
    "eval_steps": "it is called eval_interval",
    "logging_steps": "it is called log_interval",
    "dataloader_num_workers": "it is called num_workers",
    "gradient_checkpointing": "set recompute_granularity: full",
    "report_to": "set tensorboard or wandb_project",
    "version": "the conversation template is called template",
    "tune_mm_mlp_adapter": "set freeze_language_model",
    "freeze_backbone": "it is called freeze_language_model",
    "deepspeed": "parallelism is tensor_model_parallel_size, pipeline_model_parallel_size and layout",
}


def other_name(name: str) -> str:
    """What stands here for a setting of Megatron-LM, transformers or LLaVA; empty: none of those is called so."""
    return _MODEL if name in _MODEL_SETTINGS.split() else _NAMES.get(name, "")

"""TransformerEngine's user buffers: tensor-parallel messages that overlap matrix products (`tp_comm_overlap`)."""

from __future__ import annotations

from megatron_ross.config.schema import RunConfig


def start_user_buffers(run: RunConfig, hidden_size: int) -> None:
    """Allocate the buffers; once per process, with the process groups made and before the first layer runs.

    Every microbatch must have micro_batch_size * seq_length tokens, which packing sees to.
    """
    if not run.parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    modes = [base.UserBufferQuantizationMode.FP8 if run.compute.fp8 else base.UserBufferQuantizationMode.NONE]
    if run.compute.fp8 and run.compute.first_last_layers_bf16:
        modes.append(base.UserBufferQuantizationMode.NONE)
    base.initialize_ub(
        shape=[run.data.micro_batch_size * run.data.seq_length, hidden_size],
        tp_size=run.parallel.tensor_model_parallel_size,
        quantization_modes=modes,
        bootstrap_backend="nccl",
    )

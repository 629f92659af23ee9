"""The frozen VAE of a checkpoint, for runs that do not hold it: digest, weights, and its place in a new checkpoint."""

from __future__ import annotations

import hashlib
import json

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ross.checkpoint.reader import CheckpointReader
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.parallel.groups import ParallelGroups

_PREFIX = "vae."
_ENCODER = ("vae.encoder.", "vae.quant_conv.")
_ENCODER_SETTINGS = (
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "use_quant_conv",
)


def vae_digest(checkpoint: CheckpointReader) -> str:
    """Names the encoder of a checkpoint's VAE by its settings and weights, in whatever dtype these are stored.

    Raises:
        ValueError: the checkpoint is LLaVA and has no VAE, or is damaged.
    """
    vae = checkpoint.manifest.model.vae
    if vae is None:
        raise ValueError(f"{checkpoint.directory} holds a model without VAE: it has no latents")
    settings = {name: vae.hf_config.get(name) for name in _ENCODER_SETTINGS}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for key in _keys(checkpoint, *_ENCODER):
        digest.update(f"{key} {checkpoint.shape(key)}".encode())
        digest.update(checkpoint.read(key).float().numpy().tobytes())
    return digest.hexdigest()


def load_latent_encoder(checkpoint: CheckpointReader) -> LatentEncoder:
    """The checkpoint's VAE on the CPU, float32.

    Raises:
        ValueError: the checkpoint has none, or is damaged.
    """
    model = checkpoint.manifest.model
    if model.vae is None:
        raise ValueError(f"{checkpoint.directory} holds a model without VAE: it has no latents")
    encoder = LatentEncoder(model.vae, model.vision)
    encoder.vae.load_state_dict({key.removeprefix(_PREFIX): checkpoint.read(key) for key in _keys(checkpoint, _PREFIX)})
    return encoder


def vae_sharded_state(checkpoint: CheckpointReader, groups: ParallelGroups) -> ShardedStateDict:
    """The VAE's tensors as every rank of a stage with the reconstruction loss would save them, had it loaded them."""
    tensors = {key: checkpoint.read(key).float() for key in _keys(checkpoint, _PREFIX)}
    return make_sharded_tensors_for_checkpoint(tensors, "", {}, (), tp_group=groups.tp, dp_cp_group=groups.dp)


def _keys(checkpoint: CheckpointReader, *prefixes: str) -> list[str]:
    names = checkpoint.keys()
    return [name for name in names if name.startswith(prefixes)]

"""Ross models for inference with transformers: chat about images, and show what the model's outputs remember of them.

The language model is transformers' own; tower, projector, denoiser and auto-encoder are the modules of
`megatron_ross.models` under their published names, so state dicts equal published checkpoints key by key.

Shape legend: b prompts, s tokens, n images, N tokens per image, h LLM width, g patches per side,
C4 grouped latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, LlamaForCausalLM, Qwen2ForCausalLM

from megatron_ross.config.model import IMAGE_TOKEN_ID, VaeConfig, VisionConfig
from megatron_ross.config.timesteps import NUM_TRAIN_TIMESTEPS, respaced_timesteps
from megatron_ross.convert.unsupported import readable_weights
from megatron_ross.huggingface.configuration_ross import (
    RossFields,
    RossLlamaConfig,
    RossQwen2Config,
    read_model_config,
)
from megatron_ross.huggingface.hub import local_folder
from megatron_ross.huggingface.processing_ross import RossProcessor
from megatron_ross.models.denoiser import RossDenoiser
from megatron_ross.models.diffusion import cosine_tables, respace, sample
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.pictures import to_pil
from megatron_ross.models.projector import build_projector
from megatron_ross.models.vision import VisionTower

MAX_KEYS_LISTED = 20
DEFAULT_STEPS = "1000"


class PublishedVisionTower(nn.Module):
    """A VisionTower whose parameters have their published names, `vision_tower.vision_model.*`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        tower = VisionTower(config)
        self.vision_tower = nn.ModuleDict({"vision_model": tower.tower})
        self._tower = (tower,)  # in a tuple: registered once, under the published name

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, P, P] -> [n, N, d]."""
        return self._tower[0](pixels)


class PublishedPixelDecoder(nn.Module):
    """A LatentEncoder whose parameters have their published names, `pixel_decoder.*`."""

    def __init__(self, config: VaeConfig, vision: VisionConfig) -> None:
        super().__init__()
        encoder = LatentEncoder(config, vision)
        self.pixel_decoder = encoder.vae
        self._encoder = (encoder,)  # in a tuple: registered once, under the published name

    @property
    def encoder(self) -> LatentEncoder:
        """Image and latent conventions around the auto-encoder."""
        return self._encoder[0]


class RossForConditionalGeneration:
    """What Ross adds to a causal language model. `from_pretrained` returns the class of the checkpoint's LLM family."""

    config: Any
    model: Any
    _keep_in_fp32_modules_strict = ("mm_inv_projector", "pixel_decoder")  # reconstruction is computed in float32

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        vision_tower: str | Path | None = None,
        vae: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a composite checkpoint in the published format, completely: denoiser and auto-encoder too.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            vision_tower, vae: see `read_model_config`.
            kwargs: transformers' (`dtype`, `device_map`, ...).

        Raises:
            ValueError: not a Ross checkpoint, a bad config, or tensors are missing, left over or of another shape.
        """
        folder = local_folder(pretrained_model_name_or_path, **kwargs)
        model_config = read_model_config(folder, vision_tower, vae)
        config = kwargs.pop("config", None)
        if not isinstance(config, RossFields):
            config = AutoConfig.from_pretrained(folder)
        if type(config) not in _CLASSES:
            raise ValueError(
                f"{folder} has model_type {config.model_type!r}; RossForConditionalGeneration loads ross_qwen2 and "
                "ross_llama (stock LLaVA checkpoints load with transformers' own class)"
            )
        config.resolve(model_config)
        readable_weights(folder)  # refuses damaged or missing files, by name
        want_info = kwargs.pop("output_loading_info", False)
        load = super(RossForConditionalGeneration, _CLASSES[type(config)]).from_pretrained  # type: ignore[misc]
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, by name
        model, info = load(folder, *args, config=config, output_loading_info=True, **kwargs)
        _check_complete(info, folder)
        return (model, info) if want_info else model

    def _add_image_modules(self) -> None:
        config = self.config
        vision = config.vision
        self.model.vision_tower = PublishedVisionTower(vision)
        self.model.mm_projector = build_projector(config.projector, vision.hidden_size, config.hidden_size)
        if config.denoiser is not None:
            denoiser = RossDenoiser(
                config.denoiser, 4 * config.vae.latent_channels, config.hidden_size, vision.grid_size
            )
            self.model.mm_inv_projector = nn.ModuleDict({"net": denoiser})
            self.model.pixel_decoder = PublishedPixelDecoder(config.vae, vision)

    def image_embeddings(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [n, 3, P, P] -> LLM embeddings [n, N, h]."""
        embed = self.model.embed_tokens.weight
        features = self.model.vision_tower(pixel_values.to(embed.device))
        return self.model.mm_projector(features.to(embed.dtype))

    def prompt_embeddings(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Token embeddings with image embeddings at the image tokens.

        Args:
            input_ids: int64 [b, s]; every image is a run of N times -200.
            pixel_values: images in the order of their tokens, [n, 3, P, P].

        Returns:
            [b, s, h].

        Raises:
            ValueError: image tokens and images do not match in number.
        """
        is_image = input_ids == IMAGE_TOKEN_ID
        embeddings = self.model.embed_tokens(input_ids.masked_fill(is_image, 0))
        num_images = 0 if pixel_values is None else pixel_values.shape[0]
        num_tokens = self.config.vision.num_image_tokens
        needed = num_images * num_tokens
        found = int(is_image.sum())
        if found != needed:
            raise ValueError(
                f"the prompt has {found} image tokens, but {num_images} images of {num_tokens} tokens need {needed}; "
                "prepare inputs with RossProcessor"
            )
        if pixel_values is None or num_images == 0:
            return embeddings
        images = self.image_embeddings(pixel_values).flatten(0, 1)
        return embeddings.masked_scatter(is_image[..., None], images.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers' causal language models, with images; see `prompt_embeddings`."""
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.prompt_embeddings(input_ids, pixel_values)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` for prompts with images (batches are padded on the left).

        Penalties and processors that look at previous tokens see the new tokens only, as in the published code.

        Returns:
            As usual, prompts (image tokens included) followed by the new tokens.
        """
        if input_ids is None:
            return super().generate(attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeddings = self.prompt_embeddings(input_ids, pixel_values)
        result = super().generate(  # type: ignore[misc]
            inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs
        )
        new = result if isinstance(result, Tensor) else result.sequences
        prompts = input_ids.repeat_interleave(new.shape[0] // input_ids.shape[0], dim=0)
        sequences = torch.cat([prompts, new], dim=1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result

    @torch.no_grad()
    def image_hidden_states(self, prefix_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Hidden states after the final norm at the tokens of one image that follows a prompt.

        What comes after the image cannot influence them, so the prompt may end there.

        Args:
            prefix_ids: text tokens in front of the image, int64 [s], the same for every image.
            pixel_values: [n, 3, P, P].

        Returns:
            [n, N, h].
        """
        images = self.image_embeddings(pixel_values)
        prefix = self.model.embed_tokens(prefix_ids.to(images.device)).expand(images.shape[0], -1, -1)
        embeddings = torch.cat([prefix.to(images.dtype), images], dim=1)
        hidden_states = self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden_states[:, prefix.shape[1] :]

    @torch.no_grad()
    def sample_latents(
        self, condition: Tensor, x_T: Tensor, noise_fn: Callable[[int], Tensor], steps: str | int = "1000"
    ) -> Tensor:
        """Run the denoiser backwards from noise.

        Args:
            condition: hidden states at the image tokens [n, N, h].
            x_T: standard normal [n, C4, g, g].
            noise_fn: noise of step k, [n, C4, g, g].
            steps: number of sampling steps, or a respacing such as "6,6,1"; see `models.diffusion.respaced_timesteps`.

        Returns:
            Grouped latents, float32 [n, C4, g, g].

        Raises:
            ValueError: the model has no denoiser or one that regresses, or `steps` does not fit the schedule.
        """
        denoiser = self._denoiser()
        if denoiser.config.objective != "denoise":
            raise ValueError("the checkpoint's denoiser gives latents in one pass (regress): nothing is sampled")
        embedded = denoiser.embed_condition(condition)
        tables = respace(cosine_tables(), steps).to(x_T.device)
        return sample(lambda x, t: denoiser.predict_noise(x, t, embedded), x_T, noise_fn, tables)

    @torch.no_grad()
    def regress_latents(self, condition: Tensor) -> Tensor:
        """Grouped latents, float32 [n, C4, g, g], of a denoiser trained to regress them; condition [n, N, h]."""
        denoiser, encoder = self._denoiser(), self.latent_encoder
        shape = (condition.shape[0], 4 * encoder.config.latent_channels, encoder.grid_size, encoder.grid_size)
        nothing = torch.zeros(shape, device=condition.device)
        t = torch.zeros(shape[0], dtype=torch.int64, device=condition.device)
        return denoiser.predict_noise(nothing, t, denoiser.embed_condition(condition)).float()

    def check_steps(self, steps: str | int | None) -> None:
        """Refuse sampling steps that do not fit the schedule, or a denoiser that does not sample.

        Raises:
            ValueError: says which.
        """
        if self._denoiser().config.objective == "denoise":
            respaced_timesteps(NUM_TRAIN_TIMESTEPS, DEFAULT_STEPS if steps is None else steps)
        elif steps is not None:
            raise ValueError(
                f"steps {steps!r}: the checkpoint's denoiser gives latents in one pass (trained with recon_objective: "
                "regress); leave the steps out"
            )

    def reconstruct(
        self,
        images: list[Image.Image],
        *,
        steps: str | int | None = None,
        seed: int = 0,
        prompt: str | None = None,
        processor: RossProcessor | None = None,
        batch_size: int = 8,
    ) -> list[Image.Image]:
        """Paint images from the language model's outputs at their tokens.

        Args:
            images: PIL images of any size.
            steps: see `sample_latents`. 1000, the default, is the published number; 50 to 250 is a fair picture. A
                denoiser that was trained to regress latents takes one pass and no steps.
            seed: of the noise; image i of the list uses `seed + i` whatever the batch size or device.
            prompt: text in front of the image; default: the one of the training template.
            processor: default: the one stored with the checkpoint this model was loaded from.
            batch_size: images at a time.

        Returns:
            Square images of side 16 x patches per side, as the vision tower sees them (padded or stretched).

        Raises:
            ValueError: the model has no denoiser, or `steps` does not fit the schedule or the denoiser.
        """
        self.check_steps(steps)
        processor = processor or RossProcessor.from_pretrained(self.config.name_or_path)
        prefix = torch.tensor(
            processor.text_tokenizer.encode(processor.text_before_image() if prompt is None else prompt)
        )
        painted: list[Image.Image] = []
        for start in range(0, len(images), batch_size):
            pixels = processor.pixels(images[start : start + batch_size])
            condition = self.image_hidden_states(prefix.to(torch.int64), pixels)
            if self._denoiser().config.objective == "regress":
                latents = self.regress_latents(condition)
            else:
                latents = self._sample_seeded(condition, DEFAULT_STEPS if steps is None else steps, seed + start)
            painted += to_pil(self.latent_encoder.decode_latents(latents))
        return painted

    @property
    def latent_encoder(self) -> LatentEncoder:
        """The auto-encoder with Ross's conventions.

        Raises:
            ValueError: the model has none.
        """
        self._denoiser()
        return self.model.pixel_decoder.encoder

    def _sample_seeded(self, condition: Tensor, steps: str | int, first_seed: int) -> Tensor:
        """`sample_latents` with image i's noise from a generator of its own, seeded with `first_seed + i`."""
        encoder = self.latent_encoder
        shape = (4 * encoder.config.latent_channels, encoder.grid_size, encoder.grid_size)
        generators = [torch.Generator().manual_seed(first_seed + i) for i in range(condition.shape[0])]

        def noise(_: int = 0) -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(condition.device)

        return self.sample_latents(condition, noise(), noise, steps)

    def _denoiser(self) -> RossDenoiser:
        if self.config.denoiser is None:
            raise ValueError(
                "the checkpoint has no denoiser and auto-encoder (plain LLaVA): nothing can be reconstructed"
            )
        return self.model.mm_inv_projector["net"]


class RossQwen2ForCausalLM(RossForConditionalGeneration, Qwen2ForCausalLM):
    """Ross on Qwen2 or Qwen2.5."""

    config_class = RossQwen2Config

    def __init__(self, config: RossQwen2Config) -> None:
        super().__init__(config)
        self._add_image_modules()
        self.post_init()


class RossLlamaForCausalLM(RossForConditionalGeneration, LlamaForCausalLM):
    """Ross on Vicuna, Llama-2 or Llama-3."""

    config_class = RossLlamaConfig

    def __init__(self, config: RossLlamaConfig) -> None:
        super().__init__(config)
        self._add_image_modules()
        self.post_init()


_CLASSES: dict[type, Any] = {RossQwen2Config: RossQwen2ForCausalLM, RossLlamaConfig: RossLlamaForCausalLM}


def _describe(key: str | tuple[str, Any, Any]) -> str:
    """A tensor's name; for another shape than expected, both shapes too."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} {list(found)} (the config makes it {list(expected)})"


def _check_complete(info: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that did not fill the model exactly."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(_describe(key) for key in info.get(f"{kind}_keys") or ())
        if keys:
            more = f", ... ({len(keys)} in all)" if len(keys) > MAX_KEYS_LISTED else ""
            problems.append(f"{kind} tensors: {', '.join(keys[:MAX_KEYS_LISTED])}{more}")
    if problems:
        raise ValueError(f"{folder} does not fit its config; {'; '.join(problems)}")

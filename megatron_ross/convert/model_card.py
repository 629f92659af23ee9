"""README.md of an exported folder: what the model is made of, how it was trained, and what this format cannot hold."""

from __future__ import annotations

import json
from typing import Any

from megatron_ross.checkpoint.reader import CheckpointReader
from megatron_ross.convert.layouts import part_of

_FORMATS = {
    "ross": "All parts, in the format of the published Ross checkpoints (the published code and its forks load it).",
    "llava": (
        "Vision tower, projector and language model as `LlavaForConditionalGeneration`: transformers, vLLM and SGLang "
        "load it without further code."
    ),
    "adapters": "Projector and denoiser only, as the first training stage of the published code writes them.",
}
_NOT_CARRIED = (
    "The denoiser and the image auto-encoder, which reconstruct images from the model's outputs, have no place in this "
    "format and are left out. Answers do not depend on them. Export with `--format ross` to keep them."
)


def model_card(reader: CheckpointReader, format_name: str, notes: tuple[str, ...] = ()) -> str:
    """Markdown with the YAML head that the hub reads.

    Args:
        reader: the exported checkpoint.
        format_name: ross, llava or adapters.
        notes: further remarks on this export.
    """
    manifest = reader.manifest
    tags = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags:\n- ross\n- llava\n---\n"
    lines = [tags, "# Ross: reconstructive visual instruction tuning\n", _FORMATS[format_name] + "\n"]
    if format_name == "llava" and manifest.model.denoiser is not None:
        lines.append(_NOT_CARRIED + "\n")
    lines += [note + "\n" for note in notes]
    lines += ["## Parts\n", *_parts(reader), ""]
    lines += ["## Training\n", *_training(manifest.training, manifest.iteration), ""]
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    lines.append(f"Exported from iteration {manifest.iteration} by Megatron-Ross (checkpoint written with {versions}).")
    return "\n".join(lines) + "\n"


def _parts(reader: CheckpointReader) -> list[str]:
    model, manifest = reader.manifest.model, reader.manifest
    language, vision = model.language, model.vision
    rows = [
        (
            "language model",
            f"{language.family}, {language.num_layers} layers, width {language.hidden_size}",
            "language",
        ),
        ("vision tower", f"{vision.model_type}, {vision.image_size} px, {vision.num_image_tokens} tokens", "vision"),
        ("projector", model.projector.type, "projector"),
    ]
    if model.denoiser is not None and model.vae is not None:
        rows.append(("denoiser", f"{model.denoiser.type}, width {model.denoiser.width}", "denoiser"))
        rows.append(("auto-encoder", f"AutoencoderKL, {model.vae.latent_channels} latent channels", "vae"))
    stored = {part_of(key): str(reader.dtype(key)).removeprefix("torch.") for key in reader.keys()}  # noqa: SIM118
    names = {source.part: source.name for source in manifest.sources}
    whole = names.get("model")
    table = ["| part | kind | initialised from | stored as |", "| --- | --- | --- | --- |"]
    for title, kind, part in rows:
        origin = names.get(part) or whole or "scratch"
        table.append(f"| {title} | {kind} | {origin} | {stored[part]} |")
    return table


def _training(training: dict[str, Any], iteration: int) -> list[str]:
    """Everything the trainer recorded: recipe, steps, losses, digest of the consumed samples."""
    if not training:
        return [f"Not trained by Megatron-Ross (iteration {iteration})."]
    lines = [f"- iteration: {iteration}"]
    for key, value in training.items():
        if isinstance(value, dict):
            lines += [f"- {key}:", *(f"  - {name}: {_shown(item)}" for name, item in value.items())]
        else:
            lines.append(f"- {key}: {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text.replace("\n", " ")

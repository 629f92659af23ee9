"""README.md of an exported folder: how to ask and serve the model, what it is made of, how it was trained, whose terms
apply, and what this format cannot hold."""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_ross.checkpoint.reader import CheckpointReader
from megatron_ross.convert.layouts import part_of

_FORMATS = {
    "ross": "All parts, in the format of the published Ross checkpoints (the published code and its forks load it).",
    "llava": (
        "Vision tower, projector and language model as `LlavaForConditionalGeneration`, which transformers and vLLM "
        "load without further code."
    ),
    "adapters": "Projector and denoiser only, as the first training stage of the published code writes them.",
}
_NOT_CARRIED = (
    "The denoiser and the image auto-encoder, which reconstruct images from the model's outputs, have no place in this "
    "format and are left out. Answers do not depend on them. Export with `--format ross` to keep them."
)


_LICENSES = {
    "qwen/qwen2-7b-instruct": "apache-2.0",
    "qwen/qwen2-7b": "apache-2.0",
    "qwen/qwen2.5-7b-instruct": "apache-2.0",
    "qwen/qwen2.5-7b": "apache-2.0",
    "lmsys/vicuna-7b-v1.5": "llama2",
    "lmsys/vicuna-13b-v1.5": "llama2",
    "meta-llama/meta-llama-3-8b-instruct": "llama3",
    "google/siglip-so400m-patch14-384": "apache-2.0",
    "openai/clip-vit-large-patch14-336": "mit",
    "black-forest-labs/flux.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/flux.1-schnell": "apache-2.0",
}
"""Terms of the usual parts, by hub id in lower case, as their authors state them."""

_PERMISSIVE = {"apache-2.0", "mit"}
_LISTED_BY_THE_HUB = {"apache-2.0", "llama2", "llama3", "mit"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

_SNIPPETS = {
    "llava": """\
```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="THIS_FOLDER_OR_HUB_ID")
content = [{"type": "image", "url": "cat.jpg"}, {"type": "text", "text": "What is it?"}]
print(ask(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False))
```
""",
    "ross": """\
With Megatron-Ross installed, in its environment:

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="THIS_FOLDER_OR_HUB_ID", trust_remote_code=True)
content = [{"type": "image", "url": "cat.jpg"}, {"type": "text", "text": "What is it?"}]
print(ask(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False))
```
""",
}
_SERVING = """\
## Serving

```bash
vllm serve THIS_FOLDER_OR_HUB_ID --dtype bfloat16{template}
transformers serve THIS_FOLDER_OR_HUB_ID
```

Both answer OpenAI's chat completions with an `image_url`.{why}
"""
_WHY_TEMPLATE = (
    " vLLM adds no begin token to a conversation that it renders; that template writes it out. transformers adds it, "
    "and takes the other one, `chat_template.jinja`, by itself."
)


def model_card(
    reader: CheckpointReader, format_name: str, notes: tuple[str, ...] = (), serving_template: str | None = None
) -> str:
    """Markdown with the YAML head that the hub reads.

    Args:
        reader: the exported checkpoint.
        format_name: ross, llava or adapters.
        notes: further remarks on this export.
        serving_template: file with the chat template for servers that need another one.
    """
    manifest = reader.manifest
    lines = [
        _head(reader, format_name),
        "# Ross: reconstructive visual instruction tuning\n",
        _FORMATS[format_name] + "\n",
    ]
    if format_name == "llava" and manifest.model.denoiser is not None:
        lines.append(_NOT_CARRIED + "\n")
    if format_name in _SNIPPETS:
        lines += ["## Asking\n", _SNIPPETS[format_name]]
    if format_name == "llava":
        option = f" --chat-template THIS_FOLDER/{serving_template}" if serving_template else ""
        lines.append(_SERVING.format(template=option, why=_WHY_TEMPLATE if serving_template else ""))
    elif format_name == "ross":
        lines.append("Servers load the other format: export with `--format llava`.\n")
    lines += [note + "\n" for note in notes]
    lines += ["## Parts\n", *_parts(reader), ""]
    lines += ["## Training\n", *_training(manifest.training, manifest.iteration), ""]
    lines += ["## License\n", _terms(reader, format_name), ""]
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    lines.append(f"Exported from iteration {manifest.iteration} by Megatron-Ross (checkpoint written with {versions}).")
    return "\n".join(lines) + "\n"


def _head(reader: CheckpointReader, format_name: str) -> str:
    """YAML between dashes. `base_model` lists the parts that came from the hub."""
    origins = _origins(reader, format_name)
    bases = [name for name in dict.fromkeys(origins.values()) if _HUB_ID.fullmatch(name)]
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    lines += ["base_model:", *(f"- {name}" for name in bases)] if bases else []
    lines.append(f"license: {_license(origins)}")
    if _license(origins) == "other":
        lines.append("license_name: terms-of-the-parts")
    return "\n".join([*lines, "tags:", "- ross", "- llava", "---\n"])


def _origins(reader: CheckpointReader, format_name: str) -> dict[str, str]:
    """Part of this export -> where its weights started from; parts from scratch are left out."""
    parts = {"llava": ("model", "language", "vision"), "adapters": ()}.get(
        format_name, ("model", "language", "vision", "vae")
    )
    return {source.part: source.name for source in reader.manifest.sources if source.part in parts}


def _license(origins: dict[str, str]) -> str:
    """The language model's, where the terms of all parts are known and no other part restricts; else "other"."""
    known = {part: _LICENSES.get(name.lower()) for part, name in origins.items()}
    language = known.get("language")
    others = {terms for part, terms in known.items() if part != "language"}
    return language if language in _LISTED_BY_THE_HUB and others <= _PERMISSIVE else "other"


def _terms(reader: CheckpointReader, format_name: str) -> str:
    """What is known about the terms of each part."""
    origins = _origins(reader, format_name)
    if not origins:
        return "These weights contain no part of another model."
    listed = ", ".join(
        f"{name} ({_LICENSES.get(name.lower(), 'see there')})" for name in dict.fromkeys(origins.values())
    )
    return f"The terms of the models that these weights started from apply: {listed}."


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

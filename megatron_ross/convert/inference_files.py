"""What makes an exported folder answer as it was trained, whatever reads it: transformers 4 or 5, a server, our tools.

The tokenizer's settings in the form that both major versions read, a padding token, left padding, the training template
as chat template, end tokens that end what the template ends, and for the `ross` format the names of our classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_ross.checkpoint.reader import CheckpointReader
from megatron_ross.config.json_files import read_json
from megatron_ross.convert.published_config import ARCHITECTURES
from megatron_ross.convert.sources import SOURCE_CONFIG, write_json
from megatron_ross.data.conversation import END_TOKENS
from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER, TextTokenizer

GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_MODEL_INPUTS = ["input_ids", "attention_mask"]
"""Without it the generic tokenizer of transformers 4 adds token_type_ids, which no language model here takes."""

_LEAKED_SETTINGS = {"is_local", "backend", "local_files_only"}
"""How a tokenizer was loaded; transformers 5 saves it among the settings."""

_GENERIC_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""transformers 5's name -> the one that both major versions know."""

_CAPTION_ENDS = ("", ".", "!", "?", ",", '"', "'", ")")

CLASSES_FILE = "ross_classes.py"
_CLASSES = '''"""Where the Auto classes find Ross: give trust_remote_code=True, with Megatron-Ross installed."""

from megatron_ross.huggingface import (  # noqa: F401
    RossLlamaConfig,
    RossLlamaForCausalLM,
    RossProcessor,
    RossQwen2Config,
    RossQwen2ForCausalLM,
)
'''
_AUTO_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja text, and the training template that it is; None for a text of somebody else's."""

    name: str | None
    text: str


def load_source_tokenizer(reader: CheckpointReader) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's assets."""
    return AutoTokenizer.from_pretrained(reader.assets, local_files_only=True, trust_remote_code=False)


def chosen_template(
    reader: CheckpointReader, tokenizer: PreTrainedTokenizerBase, templates: Callable[[str], str]
) -> ChatTemplate:
    """The template that the trainer recorded, else what the source was asked with, else the family's.

    Args:
        reader: the checkpoint.
        tokenizer: of its assets, with the chat template that lies there.
        templates: name of a training template -> Jinja text.

    Raises:
        ValueError: the recorded template is unknown.
    """
    recorded = reader.manifest.training.get("settings", {}).get("template")
    if isinstance(recorded, str):
        return ChatTemplate(recorded, templates(recorded))
    stored = tokenizer.chat_template
    for name in (*END_TOKENS, "plain"):
        if stored == templates(name):
            return ChatTemplate(name, stored)
    if isinstance(stored, str) and IMAGE_PLACEHOLDER in stored:  # of a language model alone it knows no images
        return ChatTemplate(None, stored)
    name = family_template(reader.manifest.model.language.family, tokenizer)
    return ChatTemplate(name, templates(name))


def family_template(family: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Template that a family of language models is trained with by default."""
    if family == "qwen2":
        return "qwen_2"
    return "llama3" if END_TOKENS["llama3"] in tokenizer.get_vocab() else "v1"


def template_end_ids(template: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer of a training template; none if the tokenizer has no token for it.

    A caption of `plain` ends with its line. Byte-level tokenizers have tokens such as ".\\n" that end it, too.
    """
    if template in END_TOKENS:
        known = tokenizer.get_vocab().get(END_TOKENS[template])
        return [] if known is None else [int(known)]
    if template != "plain":
        return []
    training = TextTokenizer(tokenizer)
    last = [training.encode(f"x{end}\n")[-1] for end in _CAPTION_ENDS]
    return [token for token in dict.fromkeys(last) if training.decode([token]).endswith("\n")]


def with_ends(stored: int | Sequence[int] | None, ends: Sequence[int]) -> int | list[int] | None:
    """`eos_token_id` that has all of `ends`; as it is stored if it has them already."""
    ids = [] if stored is None else [stored] if isinstance(stored, int) else list(stored)
    if set(ends) <= set(ids):
        return stored if stored is None or isinstance(stored, int) else ids
    ids = [*(end for end in ends if end not in ids), *ids]
    return ids[0] if len(ids) == 1 else ids


def special_token_ids(
    reader: CheckpointReader, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id: of the generation config, else the config, else the tokenizer.

    The end tokens have the template's: a base model's files do not name what it was trained to end answers with. Not
    that of `plain`: a later stage that starts from these files would stop at the end of a line.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in names}
    for file in (SOURCE_CONFIG, GENERATION_CONFIG):
        if (reader.assets / file).is_file():
            values = read_json(reader.assets / file)
            ids |= {name: values[name] for name in names if values.get(name) is not None}
    if template != "plain":
        ids["eos_token_id"] = with_ends(ids["eos_token_id"], template_end_ids(template, tokenizer))
    if not _is_token(ids["pad_token_id"], tokenizer):
        end = ids["eos_token_id"]
        fallback = (tokenizer.pad_token_id, end[0] if isinstance(end, list) else end)
        ids["pad_token_id"] = next((i for i in fallback if i is not None), None)
    return ids


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, ids: dict[str, Any]) -> None:
    """Give a tokenizer the chat template, its end token, a padding token, and left padding for batched generation.

    Args:
        tokenizer: changed in place. Training pads on its own and does not look at these.
        template: see `chosen_template`.
        ids: see `special_token_ids`.
    """
    tokenizer.chat_template = template.text
    tokenizer.padding_side = "left"
    ends = [] if template.name == "plain" else template_end_ids(template.name, tokenizer)
    if ends and tokenizer.eos_token_id not in ends:  # some frameworks stop at the tokenizer's end token only
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.pad_token is None and _is_token(ids["pad_token_id"], tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ids["pad_token_id"])


def portable_settings(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer_config.json for transformers 4 and 5.

    Args:
        settings: as saved by either.
        tokenizer: see `complete_tokenizer`.
    """
    kept = {key: value for key, value in settings.items() if key not in _LEAKED_SETTINGS | {"chat_template"}}
    if isinstance(kept.get("extra_special_tokens"), list):  # transformers 4 takes a table of named tokens only
        listed = kept.pop("extra_special_tokens")
        kept.setdefault("additional_special_tokens", listed)
    if kept.get("tokenizer_class") in _GENERIC_CLASSES:
        kept["tokenizer_class"] = _GENERIC_CLASSES[kept["tokenizer_class"]]
    kept.setdefault("model_input_names", _MODEL_INPUTS)
    return kept | {"padding_side": tokenizer.padding_side} | _changed_tokens(kept, tokenizer)


def complete_ross_folder(
    directory: Path, reader: CheckpointReader, config: dict[str, Any], templates: Callable[[str], str] | None
) -> None:
    """Add to the files copied from a checkpoint's assets what the `ross` format needs to be used as it is.

    Args:
        directory: export folder, with the copied files.
        reader: the checkpoint.
        config: config.json as it will be written; gets its padding id and the names of our classes.
        templates: see `chosen_template`; None leaves the chat template as it was copied.
    """
    tokenizer = load_source_tokenizer(reader)
    template = ChatTemplate(None, "")
    if templates is not None:
        template = chosen_template(reader, tokenizer, templates)
        (directory / CHAT_TEMPLATE).write_text(template.text, encoding="utf-8")
    ids = special_token_ids(reader, tokenizer, template.name)
    complete_tokenizer(tokenizer, template, ids)
    path = directory / _TOKENIZER_CONFIG
    write_json(path, portable_settings(read_json(path) if path.is_file() else {}, tokenizer))
    path = directory / _SPECIAL_TOKENS_MAP
    if path.is_file():  # transformers 4 believes it more than tokenizer_config.json
        stored = read_json(path)
        if changed := _changed_tokens(stored, tokenizer):
            write_json(path, stored | changed)
    _complete_generation(directory / GENERATION_CONFIG, ids)
    path = directory / "preprocessor_config.json"
    if path.is_file() and "auto_map" in (stored := read_json(path)):  # names a file of the folder it came from
        write_json(path, {key: value for key, value in stored.items() if key != "auto_map"})
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = ids["pad_token_id"]
    _name_classes(directory, config, reader.manifest.model.language.family)


def _complete_generation(path: Path, ids: dict[str, Any]) -> None:
    """generation_config.json with these ids; untouched if it has them."""
    stored = read_json(path) if path.is_file() else {}
    wanted = stored | {name: value for name, value in ids.items() if value is not None}
    if wanted != stored:
        write_json(path, wanted)


def _name_classes(directory: Path, config: dict[str, Any], family: str) -> None:
    """Tell the Auto classes where ours are: by a file of imports, so that no copy of our code can grow old."""
    module = CLASSES_FILE.removesuffix(".py")
    model = ARCHITECTURES[family]
    processor = {"AutoProcessor": f"{module}.RossProcessor"}
    config["auto_map"] = {
        "AutoConfig": f"{module}.{model.removesuffix('ForCausalLM')}Config",
        **dict.fromkeys(_AUTO_MODELS, f"{module}.{model}"),
        **processor,
    }
    (directory / CLASSES_FILE).write_text(_CLASSES, encoding="utf-8")
    write_json(directory / "processor_config.json", {"processor_class": "RossProcessor", "auto_map": processor})


def _changed_tokens(stored: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """End and padding token where a settings file says something else."""
    wanted = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    return {name: token for name, token in wanted.items() if token != _content(stored.get(name))}


def _content(token: Any) -> Any:
    """Text of a token, which files write as such or as a table with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _is_token(token_id: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """False for the ids -1 and beyond the vocabulary that old configs use for "none"."""
    return isinstance(token_id, int) and 0 <= token_id < len(tokenizer)

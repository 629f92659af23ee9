"""Tokenizer of a LLaVA export: `<image>` as a real token, and the ids around it exactly as in training.

Training cuts the text at `<image>` and tokenises every piece alone, so a sentencepiece-style tokenizer puts its
implicit blank in front of the text after an image. As a special token inside one text, `<image>` has no such blank.
Then the tokenizer gets a rule that spells the blank out. Which form is right is found by trying: the saved tokenizer
is loaded again and compared with training's ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import IMAGE_TOKEN_ID
from megatron_ross.convert.inference_files import portable_settings
from megatron_ross.convert.llava_config import IMAGE_TOKEN
from megatron_ross.convert.sources import write_json
from megatron_ross.data.tokenizer import TextTokenizer

SERVING_TEMPLATE = "chat_template_with_begin_token.jinja"
"""For servers that tokenize a rendered conversation without adding special tokens: vLLM."""

_BLANK_RULE = {
    "type": "Replace",
    "pattern": {"Regex": IMAGE_TOKEN + r"(?!" + IMAGE_TOKEN + r"|\z)"},
    "content": IMAGE_TOKEN + " ",
}


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of `<image>`, which is added behind the last token unless the tokenizer has it."""
    known = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if known is None:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        known = tokenizer.get_vocab()[IMAGE_TOKEN]
    return int(known)


def write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase, training: TextTokenizer) -> None:
    """Save the tokenizer, with the blank rule if it needs it.

    Args:
        directory: export folder, with its final config.json (which influences the class that gets loaded).
        tokenizer: with the image token added.
        training: gives the ids that training makes.

    Raises:
        ValueError: neither form gives training's ids.
    """
    tokenizer.save_pretrained(directory)
    settings = portable_settings(read_json(directory / "tokenizer_config.json"), tokenizer)
    settings["processor_class"] = "LlavaProcessor"
    write_json(directory / "tokenizer_config.json", settings)
    if _agrees(directory, tokenizer, training):
        return
    rules = read_json(directory / "tokenizer.json")
    text = json.dumps(_with_blank_rule(rules), indent=2, ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    # The generic class takes tokenizer.json as it is; LlamaTokenizer would build its own rules from the vocabulary.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("legacy", None)
    write_json(directory / "tokenizer_config.json", settings)
    if not _agrees(directory, tokenizer, training):
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} cannot keep training's ids around {IMAGE_TOKEN}")


def write_serving_template(directory: Path) -> bool:
    """Write the chat template with the begin token in front, if the tokenizer adds one by itself.

    The chat template leaves it to the tokenizer, as transformers' own LLaVA processors expect; a server that does not
    let the tokenizer add it needs this one.

    Args:
        directory: export folder with the final tokenizer and its chat template.

    Raises:
        ValueError: the tokenizer makes other ids of a begin token that is written out.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not tokenizer("").input_ids:
        return False
    question = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat is this?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    wanted = tokenizer(text).input_ids
    for gap in ("", " "):  # sentencepiece-style tokenizers have a blank in front of a text that they add themselves
        if tokenizer(tokenizer.bos_token + gap + text, add_special_tokens=False).input_ids == wanted:
            template = "{{- bos_token + '" + gap + "' -}}" + tokenizer.chat_template
            (directory / SERVING_TEMPLATE).write_text(template, encoding="utf-8")
            return True
    raise ValueError(f"the tokenizer {type(tokenizer).__name__} cannot keep its ids behind {tokenizer.bos_token}")


def _with_blank_rule(rules: dict[str, Any]) -> dict[str, Any]:
    existing = rules.get("normalizer")
    others = existing["normalizers"] if existing and existing["type"] == "Sequence" else [existing] if existing else []
    tokens = [
        token | {"normalized": True} if token["content"] == IMAGE_TOKEN else token for token in rules["added_tokens"]
    ]
    return rules | {
        "normalizer": {"type": "Sequence", "normalizers": [_BLANK_RULE, *others]},
        "added_tokens": tokens,
    }


def _agrees(directory: Path, tokenizer: PreTrainedTokenizerBase, training: TextTokenizer) -> bool:
    """True if the saved tokenizer, loaded again, gives training's ids for a conversation with images."""
    reloaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    end = tokenizer.eos_token or ""
    conversation = f"USER: {IMAGE_TOKEN}\nWhat is this? ASSISTANT: A cat.{end}USER: {IMAGE_TOKEN}\nWhy? ASSISTANT:"
    image_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    wanted = [image_id if token == IMAGE_TOKEN_ID else token for token in training.encode_with_images(conversation)]
    return list(reloaded(conversation).input_ids) == wanted

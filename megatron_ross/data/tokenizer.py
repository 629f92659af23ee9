"""Text to token ids, equal for slow and fast Hugging Face tokenizers.

Sentencepiece-style tokenizers (Llama, Vicuna) come in flavours that disagree about blanks: whether the implicit blank
in front of a text is added when one is there already, and whether text after a special token gets one too (`legacy`).
Published training used the slow tokenizer, whose rules are simple, so they are applied here and only the
byte-pair merges are left to the `tokenizers` library. Byte-level tokenizers (Qwen2, Llama-3) need no such care.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from megatron_ross.config.model import IMAGE_TOKEN_ID

IMAGE_PLACEHOLDER = "<image>"
_BLANK = "\u2581"  # how sentencepiece spells a blank


class TextTokenizer:
    """Wraps a Hugging Face tokenizer; thread-safe, because it works on a private copy of the `tokenizers` backend."""

    def __init__(self, tokenizer: Any, *, legacy: bool | None = None):
        """
        Args:
            tokenizer: from `transformers.AutoTokenizer`.
            legacy: overrides the tokenizer's own `legacy` flag (sentencepiece style only).

        Raises:
            ValueError: the tokenizer has no `tokenizers` backend, or adds an end token.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(tokenizer).__name__} has no `tokenizers` backend; load it with use_fast=True")
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.legacy = bool(getattr(tokenizer, "legacy", False)) if legacy is None else legacy
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.prefix_ids: list[int] = list(tokenizer("").input_ids)
        if self.prefix_ids not in ([], [tokenizer.bos_token_id]):
            raise ValueError(f"the tokenizer adds {self.prefix_ids} to an empty text; only a begin token is supported")
        # As published: the unknown token is the padding token where there is one.
        candidates = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id: int = next((i for i in candidates if i is not None), 0)
        self._added = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}
        self._added_pattern = re.compile(
            "|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or r"(?!)"
        )
        model = self._backend.model
        self.is_sentencepiece = isinstance(model, models.BPE) and bool(model.byte_fallback)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the begin token if this tokenizer adds one. `<image>` is ordinary text."""
        return self.prefix_ids + self._encode_body(text)

    def encode_with_images(self, text: str) -> list[int]:
        """Ids of `text` with one IMAGE_TOKEN_ID per `<image>`; the texts between are encoded on their own."""
        ids = list(self.prefix_ids)
        for i, chunk in enumerate(text.split(IMAGE_PLACEHOLDER)):
            if i:
                ids.append(IMAGE_TOKEN_ID)
            ids += self._encode_body(chunk)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; special tokens are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Changes whenever ids of any text may change."""
        state = f"{self._backend.to_str()} {self.prefix_ids} {self.pad_id} {self.legacy}"
        return hashlib.blake2b(state.encode(), digest_size=8).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backend": self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_backend": Tokenizer.from_str(state["_backend"])}

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact name, None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def _encode_body(self, text: str) -> list[int]:
        if not self.is_sentencepiece:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        position = 0
        for match in self._added_pattern.finditer(text):
            ids += self._encode_segment(text[position : match.start()], is_first=position == 0)
            ids.append(self._added[match.group()])
            position = match.end()
        return ids + self._encode_segment(text[position:], is_first=position == 0)

    def _encode_segment(self, text: str, *, is_first: bool) -> list[int]:
        """Text without special tokens: blanks spelled out, one more in front if the slow tokenizer would add it."""
        if not text:
            return []
        text = text.replace(" ", _BLANK)
        if is_first or self.legacy:
            text = _BLANK + text
        return [token.id for token in self._backend.model.tokenize(text)]


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a checkpoint's assets.

    Raises:
        ValueError: the folder holds no tokenizer that can be used.
    """
    from transformers import AutoTokenizer  # seconds to import; not needed by those who bring a tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{folder}: no usable tokenizer: {error}") from None
    return TextTokenizer(tokenizer)

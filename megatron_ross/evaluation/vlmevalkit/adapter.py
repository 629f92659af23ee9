"""The model as VLMEvalKit calls it, with the published prompts. VLMEvalKit itself is not needed to import this file.

`launcher.register` joins it with VLMEvalKit's base class, which brings `dump_image`.
"""

from __future__ import annotations

import re
import string
from typing import Any

from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.generate import open_image
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.presets import preset
from megatron_ross.evaluation.prompts import Turn

DECODING = Decoding(max_new_tokens=512)
LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
DIRECT = "\nAnswer the question directly."
CHINESE_LETTER, CHINESE_DIRECT = "\n请直接回答选项字母。", "\n请直接回答问题。"
_CHINESE = re.compile("[\u4e00-\u9fff]")

Message = list[dict[str, str]]
"""VLMEvalKit's: {"type": "image" or "text", "value": path or text}."""


class VlmEvalKitAdapter:
    """Everything of the model class but its base.

    Args:
        model_path: exported folder in the Ross or the LLaVA format.
        device, dtype, template: see `ChatModel.load`.
        settings: name of a preset, see `presets.py`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
        settings: str = "default",
    ) -> None:
        super().__init__()
        chosen = preset(settings, "vlmevalkit")
        self.chat = ChatModel.load(model_path, chosen, device=device, dtype=dtype, template=template)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether `build_prompt` words a data set's questions, instead of the data set itself."""
        kind = dataset_type(dataset)
        return kind == "MCQ" or (kind == "Y/N" and dataset == "HallusionBench")

    def build_prompt(self, line: Any, dataset: str) -> Message:
        """A row of the data set as message: its pictures, then the question in the published wording.

        Raises:
            ValueError: `use_custom_prompt` says no.
        """
        if not self.use_custom_prompt(dataset):
            raise ValueError(f"{dataset} has a prompt of its own")
        text = multiple_choice_text(line) if dataset_type(dataset) == "MCQ" else f"{line['question']}{SHORT}"
        paths = self.dump_image(line, dataset)  # type: ignore[attr-defined]
        pictures = paths if isinstance(paths, list) else [paths]
        return [{"type": "image", "value": path} for path in pictures] + [{"type": "text", "value": text}]

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """The answer to a message."""
        parts = tuple(open_image(m["value"]) if m["type"] == "image" else m["value"] for m in message)
        return self.chat.answer([[Turn("user", parts)]], DECODING)[0]


def dataset_type(dataset: str) -> str | None:
    """VLMEvalKit's type of a data set; None for those it does not know."""
    from vlmeval.dataset import DATASET_TYPE

    return DATASET_TYPE(dataset, default=None)


def multiple_choice_text(line: Any) -> str:
    """Hint, question, lettered options, and what is wanted, in the question's language."""
    hint = _cell(line, "hint")
    text = f"{hint}\n{line['question']}" if hint is not None else str(line["question"])
    options = [(letter, _cell(line, letter)) for letter in string.ascii_uppercase]
    given = [f"\n{letter}. {option}" for letter, option in options if option is not None]
    text += "".join(given)
    if _CHINESE.search(text):
        return text + (CHINESE_LETTER if given else CHINESE_DIRECT)
    return text + (LETTER if given else DIRECT)


def _cell(line: Any, column: str) -> Any:
    """A value of a table's row; None where the column or the value is missing (NaN)."""
    value = line.get(column)
    return None if value is None or value != value else value

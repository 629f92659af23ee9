"""An exported checkpoint that answers conversations and scores candidate answers, in batches, for any framework.

Shape legend: b prompts, s tokens, k tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ross.evaluation.generate import load_for_inference, model_rgb
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.presets import Preset
from megatron_ross.evaluation.prompts import Turn, turn_text
from megatron_ross.huggingface import RossProcessor
from megatron_ross.huggingface.chat_templates import chat_template

Conversation = Sequence[Turn]


@dataclass
class ChatModel:
    """Model and processor of a checkpoint in the Ross or the LLaVA format, with the settings to ask it by."""

    model: Any
    processor: Any
    preset: Preset = field(default_factory=Preset)

    @classmethod
    def load(
        cls,
        checkpoint: str,
        preset: Preset,
        *,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
    ) -> ChatModel:
        """Load an exported folder.

        Args:
            checkpoint, device: see `load_for_inference`.
            dtype, template: override the preset's.

        Raises:
            ValueError: the checkpoint cannot be loaded.
        """
        model, processor = load_for_inference(checkpoint, device=device, dtype=dtype or preset.dtype, template=template)
        if template is None:
            for trained, asked in preset.templates.items():
                if processor.chat_template == chat_template(trained):
                    processor.chat_template = chat_template(asked)
        if preset.aspect_ratio == "pad":
            pad_images(processor)
        return cls(model, processor, preset)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.processor.tokenizer

    def prompt(self, conversation: Conversation, answered: bool = False) -> str:
        """The text that is tokenized.

        Args:
            conversation: turns; the last one is the question, or an answer if `answered`.
            answered: whether the text ends behind an answer, instead of where one is to begin.
        """
        texts = [turn_text(turn, self.preset.image_markers) for turn in conversation]
        # Templates move images and cut blanks, so they get names of the texts, which are put in afterwards.
        names = [f"[[{i}]]" for i, _ in enumerate(texts)]
        messages = [{"role": turn.role, "content": name} for turn, name in zip(conversation, names, strict=True)]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=False)
        pieces = []
        for name, text in zip(names, texts, strict=True):
            before, found, prompt = prompt.partition(name)
            if not found:
                raise ValueError(
                    "the chat template leaves out questions (plain is for captions); give another --template"
                )
            pieces += [before, text]
        return "".join([*pieces, prompt])

    def turn_end(self) -> str:
        """What the template writes behind an answer."""
        question = Turn("user", ("?",))
        return self.prompt([question, Turn("assistant", ("[end]",))], answered=True).partition("[end]")[2].strip()

    def answer(self, conversations: Sequence[Conversation], decoding: Decoding) -> list[str]:
        """Answers without special tokens and outer blanks, one for each conversation; the batch is padded on the left.

        Raises:
            ValueError: the preset's image markers do not fit a text.
        """
        inputs = self._inputs([self.prompt(c) for c in conversations], conversations)
        stop = decoding.stop + ((self.turn_end(),) if self.preset.turn_end_as_text else ())
        options = decoding.options()
        if stop:
            options |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options)
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_before_any(answer, stop).strip() for answer in answers]

    def score(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """How well answers fit: (mean negative log-likelihood of its tokens in nats, is it the likeliest).

        As in training, the tokens of an answer include the end of turn behind it.
        """
        blank = not self.preset.task_answer_blank
        answered = [
            (*conversation, Turn("assistant", (answer.lstrip(" ") if blank else answer,)))
            for conversation, answer in zip(conversations, answers, strict=True)
        ]
        prompts = [self.prompt(c) for c in conversations]
        texts = [self.prompt(c, answered=True) for c in answered]
        lengths = [self._length(p, c) for p, c in zip(prompts, conversations, strict=True)]
        inputs = self._inputs(texts, answered)
        mask = inputs["attention_mask"]
        num_answer = [int(row.sum()) - length for row, length in zip(mask, lengths, strict=True)]
        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=max(num_answer) + 1).logits
            never = self.model.generation_config.suppress_tokens  # `<image>` of a LLaVA export, which was not trained
            if never:
                logits[..., never] = -torch.inf
        return [
            _answer_loss(row[-k - 1 : -1], ids[-k:])
            for row, ids, k in zip(logits, inputs["input_ids"], num_answer, strict=True)
        ]

    def _length(self, prompt: str, conversation: Conversation) -> int:
        """Number of tokens of a prompt, image tokens included."""
        if isinstance(self.processor, RossProcessor):
            return len(self.processor.encode(prompt))
        return int(self._inputs([prompt], [conversation])["input_ids"].shape[1])

    def _inputs(self, prompts: Sequence[str], conversations: Sequence[Conversation]) -> Any:
        """input_ids and attention_mask [b, s], and the pictures in the order of their placeholders."""
        images = [model_rgb(self.model, image) for c in conversations for turn in c for image in turn.images]
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        inputs = self.processor(text=list(prompts), images=images or None, **options)
        return inputs.to(self.model.device)


def pad_images(processor: Any) -> None:
    """Make a processor pad pictures to squares, whatever its checkpoint says."""
    if isinstance(processor, RossProcessor):
        processor.image_transform = replace(processor.image_transform, mode="pad")
    else:
        processor.image_processor.do_pad = True


def _before_any(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        answer = answer.partition(stop)[0]
    return answer


def _answer_loss(logits: Tensor, labels: Tensor) -> tuple[float, bool]:
    """[k, vocabulary], [k] -> mean loss, and whether every label is the arg-max."""
    loss = F.cross_entropy(logits.float(), labels)
    return float(loss), bool((logits.argmax(-1) == labels).all())

"""lmms-eval's chat interface: messages with texts and pictures in their order. It cannot score candidate answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatMessages
from PIL import Image

from megatron_ross.evaluation.generate import open_image
from megatron_ross.evaluation.lmms_eval.base import LmmsModel
from megatron_ross.evaluation.lmms_eval.decoding import task_decoding
from megatron_ross.evaluation.lmms_eval.simple import MAX_ROUNDS
from megatron_ross.evaluation.prompts import Turn


class MegatronRossChat(LmmsModel):
    """`megatron_ross` for tasks that give messages."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers to (context, doc_to_messages, generation_kwargs, doc_id, task, split)."""
        return self.answer_all([(self._turns(r.args), r.args[2]) for r in requests])

    def loglikelihood(self, requests: list[Instance]) -> Any:
        """lmms-eval gives no messages for candidate answers."""
        raise ValueError("candidate answers are scored through the simple interface only: add --force_simple")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """All answers of (context, doc_to_messages, generation_kwargs, doc_id, task, split)."""
        return [self._rounds(*r.args) for r in requests]

    def _turns(self, args: tuple[Any, ...]) -> Callable[[], list[Turn]]:
        _, doc_to_messages, _, *where = args
        return lambda: turns(doc_to_messages(self.document(*where)))

    def _rounds(self, _: str, doc_to_messages: Any, gen_kwargs: Any, *where: Any) -> list[str]:
        document, decoding = self.document(*where), task_decoding(gen_kwargs, self.chat.preset)
        messages, info = doc_to_messages(document), None
        said: list[Turn] = []
        given: list[str] = []
        for number in range(1, MAX_ROUNDS + 1):
            said += turns(messages)
            given = [*given, self.chat.answer([said], decoding)[0]]
            said.append(Turn("assistant", (given[-1],)))
            messages, enough, given, info = doc_to_messages(
                document, round_idx=number, previous_output=list(given), previous_round_info=info
            )
            if enough:
                return list(given)
        raise ValueError(f"a task asked {MAX_ROUNDS} rounds and did not end")


def turns(messages: list[dict[str, Any]]) -> list[Turn]:
    """lmms-eval's messages as turns.

    Raises:
        ValueError: there is sound or a video among them.
    """
    checked = ChatMessages(messages=messages).messages
    return [Turn(message.role, tuple(_part(content) for content in message.content)) for message in checked]


def _part(content: Any) -> str | Image.Image:
    if content.type == "text":
        return str(content.text)
    if content.type != "image":
        raise ValueError(f"a task shows {content.type}; Ross models see texts and pictures only")
    return content.url if isinstance(content.url, Image.Image) else open_image(content.url)

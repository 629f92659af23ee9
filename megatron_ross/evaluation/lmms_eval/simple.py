"""lmms-eval's simple interface: a text, and pictures to be shown with it. The one that scores candidate answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance

from megatron_ross.evaluation.chat_model import Conversation
from megatron_ross.evaluation.lmms_eval.base import LmmsModel, batches
from megatron_ross.evaluation.lmms_eval.decoding import task_decoding
from megatron_ross.evaluation.prompts import Turn, user_turn

MAX_ROUNDS = 32


class MegatronRoss(LmmsModel):
    """`megatron_ross` for tasks that give text and pictures."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers to (context, generation_kwargs, doc_to_visual, doc_id, task, split)."""
        return self.answer_all([(self._question(*_parts(r.args)), r.args[1]) for r in requests])

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(loss, is_greedy) of (context, continuation, doc_to_visual, doc_id, task, split).

        lmms-eval takes the candidate with the smallest value, so this is a loss: the mean negative log-likelihood.
        0.7.3 turns plain tuples into text, hence the wrapper.
        """
        results: list[GenerationResult] = []
        with self.progress(len(requests)) as bar:
            for batch in batches(requests, self.batch_size):
                conversations, answers = [], []
                for context, target, doc_to_visual, *where in (r.args for r in batch):
                    answers.append(target if isinstance(target, str) else target(self.document(*where)))
                    conversations.append(self._question(context, doc_to_visual, *where)())
                scores = self.chat.score(conversations, answers)
                results += [GenerationResult(text=score) for score in scores]  # type: ignore[arg-type]
                bar.update(len(batch))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """All answers of (context, generation_kwargs, doc_to_visual, doc_to_text, doc_id, task, split).

        After every answer the task says what is asked and shown next, or that it has enough.
        """
        return [self._rounds(*r.args) for r in requests]

    def _question(
        self, context: str, doc_to_visual: Callable[[Any], Any] | None, *where: Any
    ) -> Callable[[], Conversation]:
        return lambda: [user_turn(context, _pictures(doc_to_visual, self.document(*where)))]

    def _rounds(self, context: str, gen_kwargs: Any, doc_to_visual: Any, doc_to_text: Any, *where: Any) -> list[str]:
        document, decoding = self.document(*where), task_decoding(gen_kwargs, self.chat.preset)
        said: list[Turn] = []
        given: list[str] = []
        info: Any = None
        text, pictures = context, _pictures(doc_to_visual, document)
        for number in range(1, MAX_ROUNDS + 1):
            said.append(user_turn(text, pictures))
            given.append(self.chat.answer([said], decoding)[0])
            said.append(Turn("assistant", (given[-1],)))
            shown, text, enough, given, info = doc_to_text(
                document, previous_output=list(given), round_idx=number, previous_round_info=info
            )
            if enough:
                return list(given)
            pictures = list(shown or ())
        raise ValueError(f"a task asked {MAX_ROUNDS} rounds and did not end")


def _parts(args: tuple[Any, ...]) -> tuple[Any, ...]:
    context, _, doc_to_visual, *where = args
    return context, doc_to_visual, *where


def _pictures(doc_to_visual: Callable[[Any], Any] | None, document: Any) -> list[Any]:
    """Pictures of a record; none for tasks of text alone."""
    shown = doc_to_visual(document) if doc_to_visual is not None else None
    return [picture for picture in shown or () if picture is not None]

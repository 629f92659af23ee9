"""What the two model classes for lmms-eval share: loading, ranks, and batches of requests.

lmms-eval gives every rank its share of the questions and gathers the results; each rank holds a whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from megatron_ross.evaluation.chat_model import ChatModel, Conversation
from megatron_ross.evaluation.lmms_eval.decoding import task_decoding
from megatron_ross.evaluation.presets import preset

T = TypeVar("T")


class LmmsModel(lmms):
    """A loaded checkpoint.

    Args:
        pretrained: exported folder in the Ross or the LLaVA format.
        batch_size: requests at a time.
        device: default: this rank's GPU if there is one.
        dtype: auto, bf16, fp16 or fp32; default: the preset's.
        template: chat template; default: the checkpoint's, or what the preset puts in its place.
        settings: name of a preset, see `presets.py`.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
        settings: str = "default",
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        where = self.accelerator.device if self._world_size > 1 or device is None else torch.device(device)
        chosen = preset(settings, "lmms-eval")
        self.chat = ChatModel.load(str(pretrained), chosen, device=str(where), dtype=dtype, template=template)
        self._device = where
        self.batch_size = int(batch_size)

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers there."""
        return self._device

    def document(self, doc_id: int, task: str, split: str) -> Any:
        """A question's record."""
        return self.task_dict[task][split][doc_id]

    def answer_all(self, requests: Sequence[tuple[Callable[[], Conversation], dict[str, Any]]]) -> list[str]:
        """Answers in the order of the requests; those with equal settings are answered together.

        Args:
            requests: what makes the conversation (pictures are opened batch by batch), and `generation_kwargs`.
        """
        groups: dict[str, list[int]] = {}
        for i, (_, gen_kwargs) in enumerate(requests):
            groups.setdefault(json.dumps(gen_kwargs, sort_keys=True, default=str), []).append(i)
        answers = [""] * len(requests)
        with self.progress(len(requests)) as bar:
            for indices in groups.values():
                decoding = task_decoding(requests[indices[0]][1], self.chat.preset)
                for batch in batches(indices, self.batch_size):
                    given = self.chat.answer([requests[i][0]() for i in batch], decoding)
                    for i, answer in zip(batch, given, strict=True):
                        answers[i] = answer
                    bar.update(len(batch))
        return answers

    def progress(self, total: int) -> tqdm[Any]:
        """A bar on the first rank."""
        return tqdm(total=total, disable=self._rank != 0, desc="answering", unit="request")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

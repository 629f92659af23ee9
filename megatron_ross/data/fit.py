"""Whether template, tokenizer, sequence length and records fit, found out when a data set is opened.

A template of another model spells its end token out in ordinary tokens, and the model learns to write the letters of
a token that it does not have; or the rounds' lengths never add up, and every sample is masked. Sequences that are too
short for an image, or for a question, hold nothing to train on.
"""

from __future__ import annotations

from megatron_ross.data.conversation import END_TOKENS, SPECIAL_TOKENS, encode_conversation
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import SampleError
from megatron_ross.data.records import Turn
from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER, TextTokenizer

_PROBE = (
    Turn("human", f"{IMAGE_PLACEHOLDER}\nWhat is it?"),
    Turn("gpt", "A small house."),
    Turn("human", "How many dogs are there?"),
    Turn("gpt", "2"),
)
_LONG = 2**20  # longer than the probe
_LOOKED_AT = 64


def check_template_fit(template: str, tokenizer: TextTokenizer, *, reference: bool = False) -> None:
    """The template's special tokens are tokens, and the labels of a conversation of two rounds can be found.

    Args:
        template: one of `conversation.TEMPLATES`.
        reference: labels exactly as published.

    Raises:
        ValueError: names the template, what does not fit, and the templates that do.
    """
    problem = _misfit(template, tokenizer, reference)
    if problem:
        fitting = [name for name in END_TOKENS if not _misfit(name, tokenizer, reference)]
        fix = f"use {' or '.join(fitting)}" if fitting else "use plain, or a tokenizer that has them"
        raise ValueError(f"template={template}: {problem}; {fix}, or start from a model that the template belongs to")


def _misfit(template: str, tokenizer: TextTokenizer, reference: bool) -> str:
    """Empty if they fit."""
    for token in SPECIAL_TOKENS.get(template, ()):
        ids = tokenizer.encode(token)[len(tokenizer.prefix_ids) :]
        if len(ids) != 1:
            what = "the end token" if token == END_TOKENS[template] else "the special token"
            return f"{what} {token} is no token of the checkpoint's tokenizer, which spells it in {len(ids)} tokens"
    if template not in END_TOKENS:
        return ""
    for num_images in (1, 0):
        turns = _PROBE if num_images else _PROBE[2:] * 2
        encoded = encode_conversation(
            turns, template, tokenizer, num_images=num_images, max_length=_LONG, reference=reference
        )
        if encoded.mismatch:
            adds = f", which adds the begin token {tokenizer.prefix_ids[0]}" if tokenizer.prefix_ids else ""
            return f"rounds of a conversation do not add up with the checkpoint's tokenizer{adds}"
    return ""


def check_room(dataset: RossDataset) -> None:
    """At least one of the data set's records keeps an image, and one a supervised token, if they have any at all.

    Some records from all over the data set are looked at; tools/prepare_data.py counts all samples that lose something.

    Raises:
        ValueError: the data set's `max_length` has no room for that; says how much is needed.
    """
    needed = []
    for index in range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT)):
        try:
            needed.append(dataset.room_needed(index))
        except SampleError:
            continue
    images = [room.image for room in needed if room.image is not None]
    answers = [room.answer for room in needed if room.answer is not None]
    parts = {"an image and the text before it": images, "a question and the first token of its answer": answers}
    for what, tokens in parts.items():
        if tokens and min(tokens) > dataset.max_length:
            raise ValueError(
                f"seq_length={dataset.max_length}: has no room for {what}, which take at least {min(tokens)} tokens "
                f"in {dataset.path}; raise seq_length to what samples need (tools/prepare_data.py counts them)"
            )

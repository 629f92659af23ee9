"""Conversation templates: turns -> token ids and labels.

The whole prompt is tokenised once; which of its tokens are supervised is found by tokenising each round (question and
answer) again and adding up lengths, because that is what defines the published labels. Where the lengths do not add
up ("tokenization mismatch") the sample is masked completely and flagged. `reference=True` reproduces the published
labels bit by bit; otherwise three flaws are mended: the last `<|im_end|>` of `qwen_2` is supervised, a literal padding
token in a text is no mismatch, and several images per turn keep their number.

A record's own system text (a first turn from "system") stands in place of the template's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ross.config.model import IGNORE_LABEL
from megatron_ross.data.errors import ConversationError
from megatron_ross.data.records import Turn
from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER, TextTokenizer

END_TOKENS = {"v1": "</s>", "qwen_2": "<|im_end|>", "llama3": "<|eot_id|>"}
"""What ends an answer, by template; a caption of `plain` ends with its line."""

SPECIAL_TOKENS = {
    **{name: (token,) for name, token in END_TOKENS.items()},
    "llama3": ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
}
"""What the tokenizer must have as single tokens, by template."""

_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_NO_SYSTEM = "template 'plain' has no place for a system text"


@dataclass(frozen=True)
class EncodedConversation:
    """`input_ids` and `labels`, one entry per token and one IMAGE_TOKEN_ID per image; labels are not shifted."""

    input_ids: list[int]
    labels: list[int]
    mismatch: bool = False


@dataclass(frozen=True)
class _Span:
    """Tokens of one round: `start` is where it begins, supervision runs from `answer` to `end`."""

    start: int
    answer: int
    end: int


def encode_conversation(
    turns: Sequence[Turn],
    template: str,
    tokenizer: TextTokenizer,
    *,
    num_images: int,
    max_length: int,
    reference: bool = False,
    supervise: bool = True,
) -> EncodedConversation:
    """Token ids and labels of one conversation.

    Args:
        turns: the record's turns, perhaps with a system text in front. A leading answer is dropped, as published.
        template: one of TEMPLATES.
        num_images: images of the record; 0 leaves `<image>` ordinary text (except in `plain`, as published).
        max_length: text-only samples are cut here; longer samples are not checked for mismatches (as published).
        reference: exactly the published ids and labels.
        supervise: False gives the same ids without a label, and needs no answer.

    Raises:
        ConversationError: roles out of turn, or a conversation the template cannot hold.
        ValueError: unknown template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")
    system, turns = split_system(turns)
    if num_images:
        turns = [Turn(t.role, normalise_placeholders(t.text, num_images, reference)) for t in turns]
    if not supervise and template == "plain" and len(turns) == 1:
        turns = [*turns, Turn("gpt", "")]
    encoded = TEMPLATES[template](turns, system, tokenizer, num_images > 0, max_length, reference)
    if supervise:
        return encoded
    return EncodedConversation(encoded.input_ids, [IGNORE_LABEL] * len(encoded.labels))


def encode_question(turns: Sequence[Turn], template: str, tokenizer: TextTokenizer, *, num_images: int) -> list[int]:
    """Token ids of a conversation's first question, its answer left to the model: what is asked at inference.

    Args as in `encode_conversation`.

    Raises:
        ConversationError: there is no question.
        ValueError: unknown template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")
    system, turns = split_system(turns)
    question = first_question(turns)
    if num_images:
        question = normalise_placeholders(question, num_images, reference=False)
    if template == "plain" and system is not None:
        raise ConversationError(_NO_SYSTEM)
    if template == "plain":
        prompt = IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER)
    elif template == "llama3":
        prompt = "".join(llama3_rounds([question, None], system))
    else:
        own, end_token = {"v1": _V1, "qwen_2": _QWEN_2}[template]
        prompt = chat_prompt([question, None], own if system is None else system, end_token)
    return tokenizer.encode_with_images(prompt) if num_images else tokenizer.encode(prompt)


def split_system(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
    """The system text of a record, None if it has none, and the other turns."""
    return (turns[0].text, turns[1:]) if turns and turns[0].role == "system" else (None, turns)


def first_question(turns: Sequence[Turn]) -> str:
    """Raises ConversationError if there is none."""
    for turn in turns:
        if turn.role == "human":
            return turn.text
    raise ConversationError("the conversation has no question")


def normalise_placeholders(text: str, num_images: int, reference: bool) -> str:
    """Move the placeholders of a turn to its front, each followed by a newline.

    The published code merges them into one. With several images (and not `reference`) their number is kept.
    """
    count = text.count(IMAGE_PLACEHOLDER)
    if not count:
        return text
    if reference or num_images == 1:
        count = 1
    rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return ((IMAGE_PLACEHOLDER + "\n") * count + rest).strip()


def _alternate(turns: Sequence[Turn]) -> list[str]:
    """Texts of turns that must go human, gpt, human, ...; a leading answer is dropped."""
    kept = list(turns[1:] if turns and turns[0].role == "gpt" else turns)
    if not kept:
        raise ConversationError("the conversation has no question")
    for i, turn in enumerate(kept):
        if turn.role != ("human", "gpt")[i % 2]:
            raise ConversationError(f"turn {i} is from {turn.role!r}: questions and answers must alternate")
    return [turn.text for turn in kept]


def _encode_plain(
    turns: Sequence[Turn],
    system: str | None,
    tokenizer: TextTokenizer,
    has_image: bool,
    max_length: int,
    reference: bool,
) -> EncodedConversation:
    """`<image>` + caption + newline; the human text is dropped, everything after the placeholder is supervised."""
    if system is not None:
        raise ConversationError(_NO_SYSTEM)
    if len(turns) != 2:
        raise ConversationError(f"template 'plain' takes a question and a caption, found {len(turns)} turns")
    if IMAGE_PLACEHOLDER not in turns[0].text:
        raise ConversationError("template 'plain' needs <image> in the first turn")
    count = 1 if reference else max(1, turns[0].text.count(IMAGE_PLACEHOLDER))
    ids = tokenizer.encode_with_images(IMAGE_PLACEHOLDER * count + turns[1].text + "\n")
    prompt_length = len(tokenizer.prefix_ids) + count
    return EncodedConversation(ids, [IGNORE_LABEL] * prompt_length + ids[prompt_length:])


def chat_prompt(texts: Sequence[str | None], system: str, end_token: str) -> str:
    """`system USER: q ASSISTANT: a<end>USER: ...`; an empty or None text leaves its role open (`ASSISTANT:`)."""
    prompt = system + " "
    for i, text in enumerate(texts):
        role, separator = (("USER", " "), ("ASSISTANT", end_token))[i % 2]
        prompt += f"{role}: {text}{separator}" if text else f"{role}:"
    return prompt


_ANSWER_MARK = " ASSISTANT: "
_V1 = (_SYSTEM.format(who="user"), END_TOKENS["v1"])
_QWEN_2 = (_SYSTEM.format(who="human"), END_TOKENS["qwen_2"])


def _rounds(prompt: str, separator: str, mark: str) -> list[tuple[str, str]]:
    """(whole round, its part up to the answer) until the first round that is empty or has not one answer mark."""
    rounds = []
    for text in prompt.split(separator):
        parts = text.split(mark)
        if not text or len(parts) != 2:
            break
        rounds.append((text, parts[0] + mark))
    return rounds


def _encode_v1(
    turns: Sequence[Turn],
    system: str | None,
    tokenizer: TextTokenizer,
    has_image: bool,
    max_length: int,
    reference: bool,
) -> EncodedConversation:
    """Vicuna: rounds end with `</s>`, which is supervised.

    Encoded alone, every round has the begin token, if the tokenizer adds one; the prompt has it once, and `</s>` behind
    every round. Later rounds of a sentencepiece-style tokenizer lose the implicit blank that only the text's first word
    gets (unless `legacy`). An instruction's last blank joins the answer's first word.
    """
    prompt = chat_prompt(_alternate(turns), _V1[0] if system is None else system, _V1[1])
    if has_image and IMAGE_PLACEHOLDER not in prompt:
        raise ConversationError("the record has an image but no turn says <image>")
    ids, encode = _encode_prompt(prompt, tokenizer, has_image, max_length)
    begin = len(tokenizer.prefix_ids)
    spans, cursor = [], begin
    for i, (text, instruction) in enumerate(_rounds(prompt, END_TOKENS["v1"], _ANSWER_MARK)):
        fewer = begin + (1 if i and tokenizer.is_sentencepiece and not tokenizer.legacy else 0)
        end = cursor + len(encode(text)) - fewer + 1
        spans.append(_Span(cursor, cursor + len(encode(instruction)) - fewer - 1, end))
        cursor = end
    return _label(ids, spans, cursor, _num_tokens(ids, tokenizer, reference), max_length)


def _encode_qwen_2(
    turns: Sequence[Turn],
    system: str | None,
    tokenizer: TextTokenizer,
    has_image: bool,
    max_length: int,
    reference: bool,
) -> EncodedConversation:
    """Qwen2: rounds end with `<|im_end|>`; a round after the first begins with the previous round's end token.

    Two tokens that a prompt ending in `ASSISTANT:` leaves to the model have no label in the published code, and have
    one by default: the blank in front of an answer where it does not join the first word (digits), and the last end
    token of the conversation.
    """
    prompt = chat_prompt(_alternate(turns), _QWEN_2[0] if system is None else system, _QWEN_2[1])
    ids, encode = _encode_prompt(prompt, tokenizer, has_image, max_length)
    spans, cursor = [], 0
    for i, (text, instruction) in enumerate(_rounds(prompt, END_TOKENS["qwen_2"], _ANSWER_MARK)):
        joint = 1 if i else 0  # the previous round's <|im_end|>: supervised
        round_ids, given = encode(text), encode(instruction if reference else instruction.rstrip())
        fewer = len(tokenizer.prefix_ids) if i else 0  # only the prompt's first round has a begin token
        end = cursor + len(round_ids) + joint - fewer
        spans.append(_Span(cursor + joint, cursor + joint + _common_prefix(round_ids, given) - fewer, end))
        cursor = end
    num_tokens = _num_tokens(ids, tokenizer, reference)
    encoded = _label(ids, spans, cursor, num_tokens - 1, max_length)
    if not reference and not encoded.mismatch and spans and cursor == len(ids) - 1:
        encoded.labels[-1] = ids[-1]
    return encoded


def _encode_llama3(
    turns: Sequence[Turn],
    system: str | None,
    tokenizer: TextTokenizer,
    has_image: bool,
    max_length: int,
    reference: bool,
) -> EncodedConversation:
    """Llama-3 headers, no system text but the record's; an answer and its `<|eot_id|>` are supervised."""
    rounds = llama3_rounds(_alternate(turns), system)
    ids, encode = _encode_prompt("".join(rounds), tokenizer, has_image, max_length)
    mark = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    spans, cursor = [], 0
    for i, text in enumerate(rounds):
        parts = text.split(mark)
        if len(parts) != 2:
            break
        fewer = len(tokenizer.prefix_ids) if i else 0  # only the prompt's first round has the begin token
        end = cursor + len(encode(text)) - fewer
        spans.append(_Span(cursor, cursor + len(encode(parts[0] + mark)) - fewer, end))
        cursor = end
    return _label(ids, spans, cursor, len(ids), max_length)


def llama3_rounds(texts: Sequence[str | None], system: str | None = None) -> list[str]:
    """One string per question and answer. A None answer leaves its header open; a lone last question is a round."""
    rounds: list[str] = []
    for i, text in enumerate(texts):
        turn = f"<|start_header_id|>{('user', 'assistant')[i % 2]}<|end_header_id|>\n\n"
        turn += "" if text is None else text + END_TOKENS["llama3"]
        if i % 2:
            rounds[-1] += turn
        else:
            rounds.append(turn)
    if system is not None:
        rounds[0] = f"<|start_header_id|>system<|end_header_id|>\n\n{system}{END_TOKENS['llama3']}" + rounds[0]
    return rounds


def _encode_prompt(
    prompt: str, tokenizer: TextTokenizer, has_image: bool, max_length: int
) -> tuple[list[int], Callable[[str], list[int]]]:
    """Ids of the prompt and the encoder to measure its parts with. Only text-only samples are cut at this point."""
    if has_image:
        return tokenizer.encode_with_images(prompt), tokenizer.encode_with_images
    return tokenizer.encode(prompt)[:max_length], tokenizer.encode


def _num_tokens(ids: list[int], tokenizer: TextTokenizer, reference: bool) -> int:
    """Length the rounds must add up to; the published code does not count literal padding tokens."""
    return len(ids) - ids.count(tokenizer.pad_id) if reference else len(ids)


def _common_prefix(a: list[int], b: list[int]) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _label(ids: list[int], spans: list[_Span], cursor: int, expected: int, max_length: int) -> EncodedConversation:
    """Labels from the rounds' spans. Between two spans (the end token of `qwen_2`) tokens are supervised."""
    if cursor < max_length and cursor != expected:
        return EncodedConversation(ids, [IGNORE_LABEL] * len(ids), mismatch=True)
    labels = list(ids[:cursor]) + [IGNORE_LABEL] * (len(ids) - cursor)
    first = spans[0].start if spans else 0
    for begin, end in [(0, first), *((span.start, span.answer) for span in spans)]:
        end = min(end, len(labels))
        labels[begin:end] = [IGNORE_LABEL] * max(0, end - begin)
    return EncodedConversation(ids, labels)


TEMPLATES: dict[str, Callable[[Sequence[Turn], str | None, TextTokenizer, bool, int, bool], EncodedConversation]] = {
    "plain": _encode_plain,
    "v1": _encode_v1,
    "qwen_2": _encode_qwen_2,
    "llama3": _encode_llama3,
}

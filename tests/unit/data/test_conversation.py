"""Token ids and labels against the golden files, and what the default mode does differently."""

from __future__ import annotations

import json
import random

import pytest
import sentencepiece

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID
from megatron_ross.data.conversation import encode_conversation, encode_question
from megatron_ross.data.errors import ConversationError
from megatron_ross.data.records import Turn, parse_record
from megatron_ross.data.tokenizer import TextTokenizer
from megatron_ross.huggingface.chat_templates import chat_template

FILES = ["text_plain_qwen2", "text_plain_vicuna", "text_qwen_2_qwen2", "text_v1_vicuna", "text_v1_vicuna_legacy"]


def _tokenizer(request, name: str, legacy: bool | None = None) -> TextTokenizer:
    return TextTokenizer(request.getfixturevalue({"llm_qwen2": "qwen", "llm_vicuna": "vicuna"}[name]), legacy=legacy)


@pytest.mark.parametrize("name", FILES)
def test_reference_mode_equals_golden(name, golden, request):
    expected = json.loads((golden / "preprocess" / f"{name}.json").read_text())
    records = {r["id"]: r for r in json.loads((golden / "preprocess/conversations.json").read_text())}
    settings = expected["tokenizer_settings"]
    tokenizer = _tokenizer(request, expected["tokenizer"], settings["legacy"])
    assert tokenizer.pad_id == settings["pad_token_id"]
    assert {r["id"] for r in expected["results"]} == set(records)
    for result in expected["results"]:
        record = parse_record(records[result["id"]], name)

        def encode(record=record):
            return encode_conversation(
                record.turns,
                expected["template"],
                tokenizer,
                num_images=len(record.images),
                max_length=settings["model_max_length"],
                reference=True,
            )

        if result["status"] == "error":
            with pytest.raises(ConversationError):
                encode()
            continue
        encoded = encode()
        assert encoded.input_ids == result["input_ids"], result["id"]
        assert encoded.labels == result["labels"], result["id"]
        assert encoded.mismatch == bool(result["mismatch_warning"]), result["id"]


def _turns(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def test_default_mode_supervises_last_end_token_and_nothing_else(request):
    tokenizer = _tokenizer(request, "llm_qwen2")
    turns = _turns("Who?", "An astronaut.", "Where?", "In orbit.")
    default, reference = (
        encode_conversation(turns, "qwen_2", tokenizer, num_images=0, max_length=999, reference=r)
        for r in (False, True)
    )
    assert default.input_ids == reference.input_ids
    assert default.labels[:-1] == reference.labels[:-1]
    assert reference.labels[-1] == IGNORE_LABEL
    assert default.labels[-1] == tokenizer.token_id("<|im_end|>")


def test_blank_in_front_of_a_digit_is_supervised_unless_reference(request):
    """A prompt ends in "ASSISTANT:", so a model that never learned the blank could not begin such an answer."""
    tokenizer = _tokenizer(request, "llm_qwen2")
    turns = _turns("How many?", "7")
    default, reference = (
        encode_conversation(turns, "qwen_2", tokenizer, num_images=0, max_length=999, reference=r)
        for r in (False, True)
    )
    assert default.input_ids == reference.input_ids
    digit = default.input_ids.index(tokenizer.encode("7")[0])
    assert default.input_ids[digit - 1 : digit + 1] == tokenizer.encode(" 7"), "the blank is a token of its own"
    assert default.labels[digit - 1 : digit + 1] == tokenizer.encode(" 7")
    assert default.labels[digit - 2] == IGNORE_LABEL
    assert reference.labels[digit - 1] == IGNORE_LABEL
    differing = [i for i, (a, b) in enumerate(zip(default.labels, reference.labels, strict=True)) if a != b]
    assert differing == [digit - 1, len(default.labels) - 1]


def test_literal_padding_token_masks_in_reference_mode_only(request):
    tokenizer = _tokenizer(request, "llm_qwen2")
    turns = _turns("Say it.", "It is <|endoftext|> here.")
    modes = [
        encode_conversation(turns, "qwen_2", tokenizer, num_images=0, max_length=999, reference=r)
        for r in (True, False)
    ]
    assert [m.mismatch for m in modes] == [True, False]
    assert tokenizer.pad_id in modes[1].labels


@pytest.mark.parametrize(("reference", "count"), [(False, 2), (True, 1)])
def test_several_images_keep_their_placeholders_unless_reference(request, reference, count):
    turns = _turns("Compare <image> with <image> now", "Same.")
    encoded = encode_conversation(
        turns, "v1", _tokenizer(request, "llm_vicuna"), num_images=2, max_length=999, reference=reference
    )
    assert encoded.input_ids.count(IMAGE_TOKEN_ID) == count


def test_placeholder_is_text_without_image(request):
    encoded = encode_conversation(
        _turns("<image>\nWhat?", "Nothing."), "v1", _tokenizer(request, "llm_vicuna"), num_images=0, max_length=999
    )
    assert IMAGE_TOKEN_ID not in encoded.input_ids
    assert not encoded.mismatch


class _ByteTokenizer(TextTokenizer):
    """Stands in for Llama-3: one id per byte, a begin token, and header tokens of their own."""

    SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def __init__(self):
        self.prefix_ids, self.pad_id, self.legacy = [500], 501, False

    def _encode_body(self, text: str) -> list[int]:
        for i, token in enumerate(self.SPECIAL):
            text = text.replace(token, chr(1 + i))
        return list(text.encode())


@pytest.mark.parametrize("num_images", [0, 1])
def test_llama3_supervises_answers_and_their_end_tokens(num_images):
    tokenizer = _ByteTokenizer()
    question = "<image>\nWho?" if num_images else "Who?"
    encoded = encode_conversation(
        _turns(question, "Me.", "Where?", "Here."), "llama3", tokenizer, num_images=num_images, max_length=999
    )
    assert not encoded.mismatch
    assert encoded.input_ids[0] == 500
    assert encoded.input_ids.count(500) == 1
    assert bytes(i for i in encoded.labels if i != IGNORE_LABEL) == b"Me.\x03Here.\x03"


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        ([Turn("human", "a"), Turn("human", "b")], "v1", "alternate"),
        ([Turn("gpt", "a")], "qwen_2", "no question"),
        (_turns("<image>", "a", "b"), "plain", "3 turns"),
        (_turns("no placeholder", "a"), "plain", "needs <image>"),
    ],
)
def test_conversations_that_do_not_fit(request, turns, template, message):
    with pytest.raises(ConversationError, match=message):
        encode_conversation(turns, template, _tokenizer(request, "llm_vicuna"), num_images=0, max_length=99)


def test_unknown_template_is_a_user_error(request):
    with pytest.raises(ValueError, match="use one of plain, v1, qwen_2, llama3"):
        encode_conversation(_turns("a", "b"), "mpt", _tokenizer(request, "llm_vicuna"), num_images=0, max_length=9)


def _slow_encode(model: sentencepiece.SentencePieceProcessor, text: str, legacy: bool) -> list[int]:
    """The published slow tokenizer's rules, on the sentencepiece library itself."""
    import re

    ids = [model.bos_id()]
    parts = re.split("(</s>|<s>|<unk>)", text)
    for i, part in enumerate(parts):
        if i % 2:
            ids.append(model.piece_to_id(part))
        elif part and (legacy or (i == 0)):
            ids += model.encode(part)  # adds the implicit blank itself
        elif part:
            ids += model.encode("<unk>" + part)[len(model.encode("<unk>")) :]
    return ids


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_rules_equal_the_sentencepiece_library(golden, vicuna, legacy):
    model = sentencepiece.SentencePieceProcessor(model_file=str(golden / "llm_vicuna/tokenizer.model"))
    tokenizer = TextTokenizer(vicuna, legacy=legacy)
    rng = random.Random(0)
    words = [
        "USER:",
        "cat",
        " ",
        "  ",
        "\n",
        "</s>",
        "<s>",
        "<unk>",
        "图",
        "☕",
        "a",
        ".",
        "\t",
        "é",
        "ASSISTANT: ",
        "<|x|>",
    ]
    for _ in range(500):
        text = "".join(rng.choice(words) for _ in range(rng.randrange(12)))
        assert tokenizer.encode(text) == _slow_encode(model, text, legacy), repr(text)


SYSTEM = "You are a careful painter.  Answer in 3 words. "


@pytest.mark.parametrize(("template", "tokenizer"), [("qwen_2", "llm_qwen2"), ("v1", "llm_vicuna")])
@pytest.mark.parametrize("num_images", [0, 1])
@pytest.mark.parametrize("reference", [False, True])
def test_a_records_system_text_takes_the_place_of_the_templates(request, template, tokenizer, num_images, reference):
    """The same ids as the exported chat template's, and the same labels as without it."""
    question = "<image>\nWho?" if num_images else "Who?"
    turns = _turns(question, "An astronaut.", "Where?", "In orbit.")
    text_tokenizer = _tokenizer(request, tokenizer, legacy=True)
    own, default = (
        encode_conversation(t, template, text_tokenizer, num_images=num_images, max_length=999, reference=reference)
        for t in ([Turn("system", SYSTEM), *turns], turns)
    )
    assert not own.mismatch
    messages = [{"role": {"human": "user", "gpt": "assistant"}[t.role], "content": t.text} for t in turns]
    hf = request.getfixturevalue({"llm_qwen2": "qwen", "llm_vicuna": "vicuna"}[tokenizer])
    prompt = hf.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, *messages], chat_template=chat_template(template), tokenize=False
    )
    assert SYSTEM in prompt
    assert own.input_ids == text_tokenizer.encode_with_images(prompt)
    supervised = [
        [i for i, label in zip(e.input_ids, e.labels, strict=True) if label != IGNORE_LABEL] for e in (own, default)
    ]
    assert supervised[0] == supervised[1]
    assert len(own.labels) - len(default.labels) == len(own.input_ids) - len(default.input_ids) != 0
    asked = encode_question([Turn("system", SYSTEM), *turns], template, text_tokenizer, num_images=num_images)
    assert own.input_ids[: len(asked) - 1] == asked[:-1]


@pytest.mark.parametrize("num_images", [0, 1])
def test_llama3_puts_a_system_text_under_its_own_header(num_images):
    question = "<image>\nWho?" if num_images else "Who?"
    turns = [Turn("system", SYSTEM), *_turns(question, "Me.", "Where?", "Here.")]
    encoded = encode_conversation(turns, "llama3", _ByteTokenizer(), num_images=num_images, max_length=999)
    assert not encoded.mismatch
    assert bytes(encoded.input_ids[1 : 1 + len(SYSTEM) + 11]) == b"\x01system\x02\n\n" + SYSTEM.encode() + b"\x03"
    assert bytes(i for i in encoded.labels if i != IGNORE_LABEL) == b"Me.\x03Here.\x03"


def test_plain_has_no_place_for_a_system_text(request):
    turns = [Turn("system", SYSTEM), *_turns("<image>", "A cat.")]
    for encode in (
        lambda: encode_conversation(turns, "plain", _tokenizer(request, "llm_qwen2"), num_images=1, max_length=99),
        lambda: encode_question(turns, "plain", _tokenizer(request, "llm_qwen2"), num_images=1),
    ):
        with pytest.raises(ConversationError, match="template 'plain' has no place for a system text"):
            encode()


@pytest.mark.parametrize(
    "raw",
    [
        {"conversations": [{"from": "system", "value": SYSTEM}, {"from": "human", "value": "a"}]},
        {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "a"}]},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
                {"role": "user", "content": "a"},
            ]
        },
        {"conversations": [{"from": "human", "value": "a"}], "system": SYSTEM},
    ],
)
def test_system_texts_are_found(raw):
    assert parse_record(raw, "f").turns == (Turn("system", SYSTEM), Turn("human", "a"))
    empty = json.loads(json.dumps(raw).replace(json.dumps(SYSTEM), '" "'))
    assert parse_record(empty, "f").turns == (Turn("human", "a"),), "the template's own"

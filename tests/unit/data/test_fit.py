"""Template, tokenizer and sequence length: what does not fit is refused, what fits is labelled right."""

from __future__ import annotations

import copy
import json

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_ross.config.model import IGNORE_LABEL
from megatron_ross.data.conversation import END_TOKENS, encode_conversation
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import ConversationError, RecordError
from megatron_ross.data.fit import check_room, check_template_fit
from megatron_ross.data.records import Turn
from megatron_ross.data.tokenizer import TextTokenizer
from tests.unit.data.conftest import chat

ROUNDS = [Turn("human", "What is it?"), Turn("gpt", "A small house."), Turn("human", "How many?"), Turn("gpt", "27")]
LLAMA_3 = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")


def _byte_level(qwen, *added: str, begin: bool) -> TextTokenizer:
    """The Qwen2 tokenizer with more special tokens, with or without a begin token."""
    backend = copy.deepcopy(qwen.backend_tokenizer)
    backend.add_special_tokens(["<|begin|>", *added])
    if begin:
        backend.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|endoftext|>")
    made = TextTokenizer(tokenizer)
    assert made.prefix_ids == ([backend.token_to_id("<|begin|>")] if begin else [])
    return made


def _supervised(tokenizer: TextTokenizer, template: str, num_images: int = 0) -> tuple[list[int], list[int]]:
    """Supervised ids, and the tokens in front of each supervised run."""
    turns = [Turn("human", "<image>\n" + ROUNDS[0].text), *ROUNDS[1:]] if num_images else ROUNDS
    encoded = encode_conversation(turns, template, tokenizer, num_images=num_images, max_length=10**6)
    assert not encoded.mismatch
    runs = [i for i, label in enumerate(encoded.labels) if label != IGNORE_LABEL and encoded.labels[i - 1] < 0]
    return [label for label in encoded.labels if label != IGNORE_LABEL], [encoded.input_ids[i - 1] for i in runs]


@pytest.mark.parametrize("num_images", [0, 1])
@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("template", ["v1", "qwen_2", "llama3"])
def test_a_begin_token_changes_no_label(qwen, template, begin, num_images):
    """Of a tokenizer of another kind than the template's own: every answer with its end token, and nothing else."""
    tokenizer = _byte_level(qwen, "</s>", *LLAMA_3, begin=begin)
    check_template_fit(template, tokenizer)
    blank = "" if template == "llama3" else " "
    ids, before = _supervised(tokenizer, template, num_images)
    wanted = []
    for answer in (ROUNDS[1].text, ROUNDS[3].text):
        wanted += tokenizer.encode(blank + answer + END_TOKENS[template])[len(tokenizer.prefix_ids) :]
    assert ids == wanted
    end_of_question = tokenizer.encode("ASSISTANT:")[-1] if blank else tokenizer.encode("\n\n")[-1]
    assert before == [end_of_question] * 2


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("template", "name", "token", "use"),
    [
        ("llama3", "qwen", "<|eot_id|>", "use qwen_2"),
        ("v1", "qwen", "</s>", "use qwen_2"),
        ("qwen_2", "vicuna", "<|im_end|>", "use v1"),
        ("llama3", "vicuna", "<|eot_id|>", "use v1"),
    ],
)
def test_a_template_of_another_model_is_refused(request, template, name, token, use, reference):
    tokenizer = TextTokenizer(request.getfixturevalue(name))
    with pytest.raises(ValueError, match=f"template={template}: the end token ") as error:
        check_template_fit(template, tokenizer, reference=reference)
    assert token in str(error.value)
    assert use in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_header_token_is_refused(qwen):
    tokenizer = _byte_level(qwen, "<|eot_id|>", begin=False)
    with pytest.raises(ValueError, match=r"template=llama3: the special token <\|start_header_id\|> is no token"):
        check_template_fit("llama3", tokenizer)


@pytest.mark.parametrize(
    ("template", "name"), [("qwen_2", "qwen"), ("v1", "vicuna"), ("plain", "qwen"), ("plain", "vicuna")]
)
def test_a_template_of_the_model_fits(request, template, name):
    for reference in (False, True):
        check_template_fit(template, TextTokenizer(request.getfixturevalue(name)), reference=reference)


def test_rounds_that_do_not_add_up_are_refused(qwen, monkeypatch):
    """A tokenizer that merges tokens over the end of a round."""
    tokenizer = _byte_level(qwen, "</s>", begin=False)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text) + [0] * text.startswith("USER"))
    monkeypatch.setattr(tokenizer, "encode_with_images", tokenizer.encode)
    with pytest.raises(ValueError, match="template=qwen_2: rounds of a conversation do not add up"):
        check_template_fit("qwen_2", tokenizer)


def _dataset(folder, records, tokenizer, processor, max_length, template="qwen_2", num_image_tokens=16, **settings):
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "images").mkdir(exist_ok=True)
    return RossDataset(folder / "data.json", folder / "images", tokenizer, template, processor, num_image_tokens,
                       max_length, **settings)  # fmt: skip


PICTURE = {"image": "a.png", "conversations": chat("<image>\nWhat is it?", "A house.")}
TEXT = {"conversations": chat("What is it?", "A house.")}


@pytest.mark.parametrize(
    ("template", "name"), [("qwen_2", "qwen"), ("v1", "vicuna"), ("plain", "qwen"), ("plain", "vicuna")]
)
def test_room_for_an_answer_is_exact(request, tmp_path, processor, template, name):
    """The first length that is accepted is the first that leaves a supervised token."""
    tokenizer = request.getfixturevalue(name)

    def made(max_length):
        return _dataset(tmp_path, [PICTURE], tokenizer, processor, max_length, template)

    accepted = []
    for length in range(1, 250):
        try:
            check_room(made(length))
        except ValueError as error:
            assert f"seq_length={length}: has no room" in str(error)  # noqa: PT017
        else:
            accepted.append(length)
    first = accepted[0]
    assert accepted == list(range(first, 250))
    assert (made(first)[0].labels >= 0).sum() == 1
    try:
        assert not (made(first - 1)[0].labels >= 0).any()
    except ConversationError:
        assert template == "plain"


def test_no_room_for_an_image_is_named_although_texts_fit(tmp_path, qwen, processor):
    records = [TEXT] * 9 + [PICTURE]
    check_room(_dataset(tmp_path, records[:9], qwen, processor, 200, num_image_tokens=729))
    with pytest.raises(ValueError, match=r"seq_length=200: has no room for an image and the text before it.* 760 tok"):
        check_room(_dataset(tmp_path, records, qwen, processor, 200, num_image_tokens=729))


def test_broken_records_do_not_matter(tmp_path, qwen, processor):
    check_room(_dataset(tmp_path, [{"id": 1}, 3, TEXT], qwen, processor, 512))
    check_room(_dataset(tmp_path, [{"id": 1}, 3], qwen, processor, 512))


def test_plain_shorter_than_an_image_is_a_finding(tmp_path, qwen, vicuna, processor):
    """Nothing would be left of such a sample; with a begin token, one token is."""
    dataset = _dataset(tmp_path, [PICTURE], qwen, processor, 15, "plain")
    for ask in (dataset.__getitem__, dataset.measure):
        with pytest.raises(ConversationError, match=r"begins with an image, whose 16 tokens .* seq_length 15"):
            ask(0)
    with pytest.raises(ConversationError, match="seq_length 15 has no room for its first image"):
        dataset.question(0)
    kept = _dataset(tmp_path, [PICTURE], vicuna, processor, 15, "plain")[0]
    assert (len(kept.input_ids), kept.num_images_cut) == (1, 1)


@pytest.mark.parametrize("supervise", [True, False])
def test_more_images_than_noise_keys_are_a_finding(tmp_path, qwen, processor, supervise):
    def made(count):
        conversation = chat("<image>\n" * count + "Which?", "None.")
        record = {"image": ["a.png"] * count, "conversations": conversation}
        return _dataset(tmp_path, [record], qwen, processor, 10**6, supervise=supervise)

    assert made(256).measure(0).num_images == 256
    for ask in (made(257).__getitem__, made(257).measure):
        with pytest.raises(RecordError, match="has 257 images; a sample may have at most 256"):
            ask(0)

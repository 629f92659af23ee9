"""Text for the toy language model: reading exercises without pictures, and the tokenizer trained on them.

A real run starts from a language model that can already read. Ours learns, from text alone, what it will need: to
answer a question about notes ("red circle top left, 7 digit bottom right, a cat"), and to turn notes into a caption.
Stage 1 then teaches the projector to make picture tokens that serve like such notes.
"""

from __future__ import annotations

import json

import numpy as np
from conversations import caption, notes, questions, text_only_record
from scenes import Scene, make_scene
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from megatron_ross.config.model import IGNORE_LABEL
from megatron_ross.data.conversation import chat_prompt, encode_conversation
from megatron_ross.data.records import Turn
from megatron_ross.data.tokenizer import TextTokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM = (  # in the template `qwen_2`; here so that the tokenizer knows its words
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
MODEL_MAX_LENGTH = 1024
FIRST_TEXT_SCENE = 1_000_000  # scenes for text only: no picture of the data set shows them
QUESTIONS_PER_TEXT = 3


def reading_exercise(seed: int, index: int) -> list[Turn]:
    """Notes and questions about them (or, one in six, a conversation as in stage 2's text-only records)."""
    rng = np.random.default_rng([seed, index, 2])
    if rng.integers(6) == 0:
        record = text_only_record("", rng)
        return [Turn(turn["from"], turn["value"]) for turn in record["conversations"]]
    scene = make_scene(seed, FIRST_TEXT_SCENE + index)
    pairs = list(questions(scene, rng).values())
    turns = []
    for i, j in enumerate(rng.permutation(len(pairs))[:QUESTIONS_PER_TEXT]):
        text = f"{notes(scene, rng)}\n{pairs[j][0]}" if i == 0 else pairs[j][0]
        turns += [Turn("human", text), Turn("gpt", pairs[j][1])]
    return turns


def retelling(seed: int, index: int) -> str:
    """Notes and the caption of the same scene: the text form of a stage-1 sample."""
    rng = np.random.default_rng([seed, index, 3])
    scene: Scene = make_scene(seed, FIRST_TEXT_SCENE + index)
    return f"{notes(scene, rng)}\n{caption(scene, rng)}\n"


def train_tokenizer(seed: int, vocab_size: int, num_texts: int = 2000) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's splitting rule and special tokens.

    Args:
        vocab_size: upper bound, special tokens included.
    """
    rule = Qwen2Tokenizer().backend_tokenizer  # Qwen2's own normaliser and splitting rule
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [retelling(seed, i) for i in range(num_texts)]
    corpus += [chat_prompt([turn.text for turn in reading_exercise(seed, i)], SYSTEM, "\n") for i in range(num_texts)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    vocab, merges = tokenizer.get_vocab(), _merges(tokenizer)
    trained = Qwen2Tokenizer(
        vocab=dict(sorted(vocab.items(), key=lambda item: item[1])),
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MODEL_MAX_LENGTH,
    )
    trained.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return trained


def encode_exercises(tokenizer: Qwen2Tokenizer, seed: int, num_texts: int) -> list[tuple[list[int], list[int]]]:
    """Pretraining texts as (ids, labels); a label is IGNORE_LABEL where nothing can be known from what was read.

    Half are reading exercises in the template of stage 2, half are retellings in that of stage 1.
    """
    text_tokenizer = TextTokenizer(tokenizer)
    encoded = []
    for index in range(num_texts):
        if index % 2:
            conversation = encode_conversation(
                reading_exercise(seed, index), "qwen_2", text_tokenizer, num_images=0, max_length=MODEL_MAX_LENGTH
            )
            encoded.append((conversation.input_ids, conversation.labels))
        else:
            read, _, told = retelling(seed, index).partition("\n")
            prompt, answer = text_tokenizer.encode(read + "\n"), text_tokenizer.encode(told)
            encoded.append((prompt + answer, [IGNORE_LABEL] * len(prompt) + answer))
    return encoded


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Merge rules in order, out of the tokenizer's own serialisation."""
    rules = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(rule) if isinstance(rule, list) else tuple(rule.split(" ")) for rule in rules]

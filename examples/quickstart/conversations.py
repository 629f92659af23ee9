"""Captions, questions and answers about a scene, as LLaVA records.

A record is `{"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`; text-only records
have no "image". Answers are short, so that greedy generation can be compared with them word by word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scenes import COLORS, NUMBER_WORDS, PHOTOS, SHAPES, Item, Scene

Record = dict[str, Any]
Question = tuple[str, str]  # question, answer

CAPTION_PROMPTS = ("Describe the picture.", "What is in this picture?", "Give a short caption.")
TURNS_PER_RECORD = 4


def _phrase(item: Item) -> str:
    name = f"the digit {item.value}" if item.kind == "digit" else f"a {item.value} {item.kind}"
    return f"{name} at the {item.quadrant}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence that names the photograph and every item; the items' order is drawn from `rng`."""
    items = [_phrase(item) for item in (*scene.shapes, scene.digit)]
    items = [items[i] for i in rng.permutation(len(items))]
    return f"A photo of {PHOTOS[scene.photo]} with {', '.join(items[:-1])} and {items[-1]}."


def questions(scene: Scene, rng: np.random.Generator) -> dict[str, Question]:
    """One question of each type; `rng` chooses which shape it is about."""
    colored, placed, named = (scene.shapes[i] for i in rng.integers(len(scene.shapes), size=3))
    return {
        "color": (f"What color is the {colored.kind}?", colored.value),
        "position": (f"Where is the {placed.kind}?", placed.quadrant),
        "shape": (f"Which shape is at the {named.quadrant}?", named.kind),
        "count": ("How many shapes are there?", NUMBER_WORDS[len(scene.shapes)]),
        "digit": ("Which digit is written?", scene.digit.value),
        "photo": ("What is in the background?", PHOTOS[scene.photo]),
    }


def turns(pairs: list[Question], image: bool) -> list[dict[str, str]]:
    """The turns of a record; the first question carries the image's tag."""
    result = []
    for i, (question, answer) in enumerate(pairs):
        tag = "<image>\n" if image and i == 0 else ""
        result += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return result


def caption_record(name: str, image: str, scene: Scene, rng: np.random.Generator) -> Record:
    """Stage 1: one caption (the template `plain` drops the human text, as in LLaVA's data)."""
    prompt = str(rng.choice(CAPTION_PROMPTS))
    return {"id": name, "image": image, "conversations": turns([(prompt, caption(scene, rng))], image=True)}


def question_record(name: str, image: str, scene: Scene, rng: np.random.Generator) -> Record:
    """Stage 2: a conversation of `TURNS_PER_RECORD` questions of different types."""
    pairs = list(questions(scene, rng).values())
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:TURNS_PER_RECORD]]
    return {"id": name, "image": image, "conversations": turns(chosen, image=True)}


def heldout_records(name: str, image: str, scene: Scene, rng: np.random.Generator) -> list[Record]:
    """Evaluation: one single-turn record per question type; the key "question_type" says which."""
    return [
        {"id": f"{name}-{kind}", "image": image, "question_type": kind, "conversations": turns([pair], image=True)}
        for kind, pair in questions(scene, rng).items()
    ]


def text_only_record(name: str, rng: np.random.Generator) -> Record:
    """A conversation without a picture: counting and vocabulary."""
    n, a, b = int(rng.integers(1, 9)), int(rng.integers(0, 5)), int(rng.integers(0, 5))
    color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
    pairs = [
        (f"What comes after {NUMBER_WORDS[n]}?", NUMBER_WORDS[n + 1]),
        (f"What comes before {NUMBER_WORDS[n]}?", NUMBER_WORDS[n - 1]),
        (f"What is {NUMBER_WORDS[a]} plus {NUMBER_WORDS[b]}?", NUMBER_WORDS[a + b]),
        (f"Is {color} a color or a shape?", "a color"),
        (f"Is {shape} a color or a shape?", "a shape"),
    ]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[: rng.integers(1, 4)]]
    return {"id": name, "conversations": turns(chosen, image=False)}


def notes(scene: Scene, rng: np.random.Generator) -> str:
    """The scene as bare notes in random order: text in place of a picture, which the toy LLM is pretrained to read."""
    items = [f"{item.value} {item.kind} {item.quadrant}" for item in (*scene.shapes, scene.digit)]
    items.append(PHOTOS[scene.photo])
    return ", ".join(items[i] for i in rng.permutation(len(items)))

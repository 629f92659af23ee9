"""Asks a LLaVA export with vLLM's offline interface; run by tests in a process of its own.

    python ask_vllm.py FOLDER QUESTIONS.json

Prints one JSON object. Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams

SERVING_TEMPLATE = "chat_template_with_begin_token.jinja"


def main(folder: Path, questions: list[dict]) -> dict[str, list[list[int]]]:
    """Prompts and greedy tokens."""
    engine = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 1},
    )
    conversations = []
    for question in questions:
        picture = {"type": "image_pil", "image_pil": Image.open(question["picture"]).convert("RGB")}
        text = {"type": "text", "text": question["question"]}
        conversations.append([{"role": "user", "content": [picture, text]}])
    template = folder / SERVING_TEMPLATE
    outputs = engine.chat(
        conversations,
        SamplingParams(temperature=0, max_tokens=questions[0]["max_new_tokens"]),
        chat_template=template.read_text() if template.is_file() else None,
    )
    return {
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))

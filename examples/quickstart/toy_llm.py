"""A small Qwen2 that has learned to read (see `toy_text.py`), saved as transformers saves it.

python examples/quickstart/toy_llm.py --output DIR
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from toy_text import MODEL_MAX_LENGTH, encode_exercises, train_tokenizer
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from megatron_ross.config.model import IGNORE_LABEL

VOCAB_SIZE = 640
BAR_ROW = 0  # of the progress bar: make_components.py shows three at once


def build_llm(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Qwen2 with random weights. Heads and key/value groups divide by 2 (TP), layers too (PP)."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MODEL_MAX_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-6,
            initializer_range=0.04,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


Text = tuple[list[int], list[int]]  # ids, labels


def batches_of_similar_length(texts: list[Text], batch_size: int) -> list[list[Text]]:
    """Cut `texts` into batches; within each run of 8 batches the texts are sorted by length, which saves padding."""
    batches = []
    for start in range(0, len(texts), 8 * batch_size):
        run = sorted(texts[start : start + 8 * batch_size], key=lambda text: len(text[0]))
        batches += [run[i : i + batch_size] for i in range(0, len(run), batch_size)]
    return batches


def _collate(texts: list[Text]) -> tuple[Tensor, Tensor]:
    ids = pad_sequence([torch.tensor(ids) for ids, _ in texts], batch_first=True)
    labels = pad_sequence([torch.tensor(labels) for _, labels in texts], batch_first=True, padding_value=IGNORE_LABEL)
    return ids, labels


def pretrain_llm(model: Qwen2ForCausalLM, batches: list[list[Text]], lr: float) -> float:
    """Next-token training, one step per batch; returns the mean loss of the last tenth of the steps.

    Only the supervised positions pass through the head.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=len(batches), pct_start=0.1, cycle_momentum=False, final_div_factor=100
    )
    losses = []
    progress = tqdm(batches, desc="language model", unit="step", position=BAR_ROW)
    for texts in progress:
        ids, labels = _collate(texts)
        hidden = model.model(ids).last_hidden_state[:, :-1]
        known = labels[:, 1:] != IGNORE_LABEL
        loss = cross_entropy(model.lm_head(hidden[known]), labels[:, 1:][known])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def make_llm(output: Path, seed: int = 0, steps: int = 700, batch_size: int = 8, lr: float = 2e-3) -> str:
    """Train tokenizer and language model.

    Args:
        output: folder for `save_pretrained`.
        seed: of the texts and the initial weights.

    Returns:
        A line that says what was made.
    """
    torch.set_num_threads(1)  # the three components are made at the same time
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed, VOCAB_SIZE)
    model = build_llm(tokenizer)
    texts = encode_exercises(tokenizer, seed, steps * batch_size)
    loss = pretrain_llm(model, batches_of_similar_length(texts, batch_size), lr)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    return f"language model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, loss {loss:.3f}"


if __name__ == "__main__":
    print(auto_cli(make_llm, as_positional=False))

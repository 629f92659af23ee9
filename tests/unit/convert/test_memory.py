"""Peak memory of conversions: independent of the size of the model, both ways and in every format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.helpers.big_checkpoint import write_random_llm

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "bos_token_id": 573,
    "eos_token_id": 575,
}
"""About 2.6 GB in bfloat16, with a largest tensor of 131 MB."""

_PROGRAM = """
import json, re, sys
from pathlib import Path
import transformers  # part of the baseline, whatever the format
import megatron_ross.convert.llava_export
from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
# Not ru_maxrss: a process starts with its parent's.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
function, arguments = {"import": import_checkpoint, "export": export_checkpoint}[sys.argv[1]], json.loads(sys.argv[2])
if sys.argv[1] == "export":
    from megatron_ross.huggingface.chat_templates import chat_template
    arguments["templates"] = chat_template
function(**{name: Path(value) if name == "output" else value for name, value in arguments.items()})
print(json.dumps(peak() - before))
"""


def _growth(command: str, **arguments: str) -> int:
    """Bytes by which the peak resident size of a fresh process grows during a conversion."""
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, command, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    return int(result.stdout.strip().splitlines()[-1])


def _tensors(folder: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names |= dict.fromkeys(file.keys(), path)
    return names


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(golden_dir: Path, tmp_path: Path) -> None:
    largest = write_random_llm(tmp_path / "llm", golden_dir / "llm_qwen2", CONFIG, max_shard_bytes=1 << 30)
    total = sum(path.stat().st_size for path in (tmp_path / "llm").glob("*.safetensors"))
    bound = 2 * largest + 2**30
    assert total > 1.5 * bound  # so that the test can fail
    tower = str(golden_dir / "vision_siglip")
    growth = {"import": _growth("import", llm=str(tmp_path / "llm"), vision_tower=tower, output=str(tmp_path / "in"))}
    for format_ in ("ross", "llava"):
        growth[format_] = _growth(
            "export", checkpoint=str(tmp_path / "in"), output=str(tmp_path / format_), format=format_
        )
    print({"largest": largest, "total": total, **growth})
    assert max(growth.values()) < bound
    source, exported = _tensors(tmp_path / "llm"), _tensors(tmp_path / "ross")
    for name, path in source.items():
        with safe_open(path, framework="pt") as left, safe_open(exported[name], framework="pt") as right:
            assert torch.equal(left.get_tensor(name).view(torch.int16), right.get_tensor(name).view(torch.int16)), name

"""What users get wrong, and what hostile files try: one line that names the file, exit code 1, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.cli import import_checkpoint as importing
from megatron_ross.convert import atomic, importer
from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.convert.hf_io import WeightFolder, load_torch_tensors
from megatron_ross.convert.torch_dist_writer import LazyTensor

Edit = Callable[[Path], object]


def _edit_config(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 500_000)


def _index(*files: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": {str(number): file for number, file in enumerate(files)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def _repeat_shard(folder: Path) -> None:
    _index("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")


def _without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _set(name: str, value: Callable[[Tensor], Tensor]) -> Edit:
    return _edit_tensors(lambda tensors: tensors.update({name: value(tensors[name])}))


def _only(name: str) -> Edit:
    """The weights replaced by a file of that name."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"x")

    return edit


Q, EMBEDDING, HEAD = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
LANGUAGE_MISTAKES: dict[str, tuple[Edit, str]] = {
    "truncated shard": (_truncate, r"llm/model\.safetensors is damaged or truncated"),
    "missing shard": (
        _index("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        r"index\.json names model-00002-of-00002\.safetensors, which is missing",
    ),
    "shard outside": (_index("../secret.safetensors"), r"not a weight file in its own folder"),
    "tensor twice": (_repeat_shard, r"is also in model-00001-of-00002\.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"llm has no weights"),
    "missing tensor": (_edit_tensors(lambda tensors: tensors.pop(Q)), rf"missing 1: {Q}"),
    "unknown tensors": (
        _edit_tensors(lambda tensors: tensors.update({"b.weight": torch.ones(1), "a.weight": torch.ones(1)})),
        r"unknown 2: a\.weight, b\.weight",
    ),
    "wrong shape": (_set(Q, lambda t: t[:32].clone()), rf"{Q} is \[32, 64\] .*expected \[64, 64\]"),
    "two dtypes": (_set(Q, lambda t: t.bfloat16()), rf"dtype mismatch: {Q} is torch\.bfloat16"),
    "integers": (_set(Q, lambda t: t.to(torch.int8)), rf"{Q} is torch\.int8"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "config is text": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), r"should hold a JSON object"),
    "deep config": (lambda folder: (folder / "config.json").write_text("[" * 200_000), r"is not valid JSON"),
    "another family": (_edit_config(model_type="mamba"), r"model_type is 'mamba', it must be one of 'qwen2'"),
    "absurd size": (_edit_config(hidden_size=10**12), r"hidden_size is 1000000000000, it must be an integer from 1"),
    "absurd depth": (_edit_config(num_hidden_layers=10**9), r"num_hidden_layers is 1000000000, it must be"),
    "negative": (_edit_config(vocab_size=-5), r"vocab_size is -5"),
    "text for a number": (_edit_config(intermediate_size="160"), r"intermediate_size is '160'"),
    "true for a number": (_edit_config(hidden_size=True), r"hidden_size is True"),
    "not a number": (_edit_config(rms_norm_eps=float("nan")), r"rms_norm_eps is nan"),
    "heads do not fit": (_edit_config(num_attention_heads=7, num_key_value_heads=7), r"7 heads do not fit"),
    "sliding window": (_edit_config(use_sliding_window=True), r"use_sliding_window is True, it must be one of False"),
    "activation": (_edit_config(hidden_act="relu"), r"hidden_act is 'relu', it must be one of 'silu'"),
    "rope": (_edit_config(rope_scaling={"type": "yarn", "factor": 4.0}), r"rope_type is 'yarn'"),
    "rope without factor": (_edit_config(rope_scaling={"type": "linear"}), r"rope_scaling\.factor is None"),
    "another llama3 scaling": (
        _edit_config(rope_scaling={"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 2.0}),
        r"rope_scaling\.high_freq_factor is 2\.0, it must be 4: other values are not implemented",
    ),
    "another original length": (
        _edit_config(rope_parameters={"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 4096}),
        r"rope_parameters\.original_max_position_embeddings is 4096, it must be 8192",
    ),
    "rope of part of a head": (
        _edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor is 0\.5, it must be 1",
    ),
    "rope per kind of layer": (
        _edit_config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        r"rope_parameters\.'full_attention' is .*: default scaling with it is not implemented",
    ),
    "mrope": (
        _edit_config(rope_scaling={"type": "default", "mrope_section": [1, 2, 3]}),
        r"'mrope_section' is \[1, 2, 3\]",
    ),
    "LoRA adapter": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2-7B"}'),
        r"llm is a LoRA adapter of 'Qwen/Qwen2-7B' .*merge_and_unload",
    ),
    "LoRA beside the weights": (
        _edit_tensors(lambda tensors: tensors.update({Q.replace("weight", "lora_A.weight"): torch.ones(8, 64)})),
        r"lora_A\.weight, \.\.\.\) are a LoRA adapter's: merge it",
    ),
    "unmerged PEFT model": (
        _edit_tensors(lambda tensors: tensors.update({f"base_model.model.{n}": tensors.pop(n) for n in list(tensors)})),
        r"base_model\.model\..*unmerged PEFT model: merge it",
    ),
    "data parallel": (
        _edit_tensors(lambda tensors: tensors.update({f"module.{n}": tensors.pop(n) for n in list(tensors)})),
        r"module\..*DistributedDataParallel or DeepSpeed: save the state dict of the module inside",
    ),
    "quantised": (
        _edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"config\.json has quantization_config \(method 'gptq'\): quantised weights are not read",
    ),
    "quantised tensors": (
        _edit_tensors(lambda tensors: tensors.update({Q.replace(".weight", ".qweight"): tensors.pop(Q)})),
        r"qweight, \.\.\.\) are those of a quantised model",
    ),
    "GGUF": (_only("model-Q4_K_M.gguf"), r"llm holds GGUF files: quantised weights are not read"),
    "ZeRO shards": (_only("zero_to_fp32.py"), r"DeepSpeed ZeRO shards: run `python zero_to_fp32\.py"),
    "added tokens": (
        _edit_tensors(
            lambda tensors: tensors.update({n: torch.cat([tensors[n], tensors[n][:3]]) for n in (EMBEDDING, HEAD)})
        ),
        r"embed_tokens\.weight has 579 rows and lm_head\.weight has 579 rows, .* is 576: .*; set vocab_size to 579",
    ),
    "head of another merge": (
        _edit_tensors(lambda tensors: tensors.update({HEAD: tensors[HEAD][:570].clone()})),
        r"has 576 rows and lm_head\.weight has 570 rows.*merged with another vocabulary; save both from one model",
    ),
    "small vocabulary": (_edit_config(vocab_size=500), r"largest id is 575, but vocab_size is 500"),
    "no tokenizer": (_without_tokenizer, r"has no tokenizer"),
}


def _convert(output: Path, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    """Run the import tool; it must fail with code 1 and one line, which is returned, and leave nothing."""
    arguments = [item for name, value in options.items() for item in (f"--{name.replace('_', '-')}", str(value))]
    output.parent.mkdir(exist_ok=True)
    assert importing.main([*arguments, "--output", str(output)]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    message = [line for line in error if line.startswith("error: ")]
    assert message == error[-1:]
    assert list(output.parent.iterdir()) == []
    return message[0]


@pytest.mark.parametrize("mistake", LANGUAGE_MISTAKES)
def test_language_model_mistakes(
    mistake: str, golden_dir: Path, golden_llm_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = LANGUAGE_MISTAKES[mistake]
    edit(golden_llm_copy)
    error = _convert(tmp_path / "out" / "x", capsys, llm=golden_llm_copy, vision_tower=golden_dir / "vision_siglip")
    assert _matches(message, error), error


def _matches(pattern: str, text: str) -> bool:

    return re.search(pattern, text) is not None


TOWER_MISTAKES: dict[str, tuple[Edit, str]] = {
    "another resolution": (
        _edit_config(image_size=70),
        r"preprocessor_config\.json: size is .*56.*, but the tower takes 70 x 70",
    ),
    "another width": (_edit_config(hidden_size=64), r"wrong shape: .*expected \[64, 3, 14, 14\]"),
    "NaFlex": (_edit_config(model_type="siglip2_vision_model"), r"model_type is 'siglip2_vision_model'"),
    "absurd": (_edit_config(image_size=10**6), r"image_size is 1000000"),
    "no processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        r"preprocessor_config\.json is missing",
    ),
}


@pytest.mark.parametrize("mistake", TOWER_MISTAKES)
def test_tower_mistakes(mistake: str, golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, message = TOWER_MISTAKES[mistake]
    tower = shutil.copytree(golden_dir / "vision_siglip", tmp_path / "tower")
    edit(tower)
    error = _convert(tmp_path / "out" / "x", capsys, llm=golden_dir / "llm_qwen2", vision_tower=tower)
    assert _matches(message, error), error


def test_adapters_of_another_model(golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A projector for a tower of another width, swapped files, and a denoiser without auto-encoder."""
    torch.save({"model.mm_projector.0.weight": torch.ones(64, 32)}, tmp_path / "partial.bin")
    torch.save(
        {f"model.mm_projector.{name}": torch.ones(*shape) for name, shape in _projector_shapes(width=32).items()},
        tmp_path / "narrow.bin",
    )
    parts = {"llm": golden_dir / "llm_qwen2", "vision_tower": golden_dir / "vision_siglip"}

    def error(**options: object) -> str:
        return _convert(tmp_path / "out" / "x", capsys, **parts, **options)

    assert "missing 3: 0.bias" in error(mm_projector=tmp_path / "partial.bin")
    assert "0.weight is [64, 32]" in error(mm_projector=tmp_path / "narrow.bin")
    assert "should hold mm_inv_projector.* tensors" in error(
        vae=golden_dir / "vae", mm_inv_projector=tmp_path / "narrow.bin"
    )
    assert "--mm-inv-projector needs --vae" in error(mm_inv_projector=tmp_path / "narrow.bin")
    assert "needs equal widths" in error(projector_type="identity")
    assert "projector type 'mlp' is unknown" in error(projector_type="mlp")
    assert "denoiser type 'unet' is unknown" in error(vae=golden_dir / "vae", denoiser_type="unet")
    assert "multiple of its 16 heads" in error(vae=golden_dir / "vae", denoiser_width=100)


def _projector_shapes(width: int) -> dict[str, tuple[int, ...]]:
    return {"0.weight": (64, width), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}


COMPOSITE_MISTAKES: dict[str, tuple[Edit, str]] = {
    "tower outside": (_edit_config(mm_vision_tower="../vision_siglip"), r"tower '\.\./vision_siglip' is unknown"),
    "tower elsewhere": (_edit_config(mm_vision_tower="/etc"), r"tower '/etc' is unknown, .*: give .*--vision-tower"),
    "widths do not meet": (_edit_config(mm_hidden_size=1152), r"mm_hidden_size is 1152, but the parts make it 48"),
    "target size": (_edit_config(decode_image_size=432), r"decode_image_size is 432, but the parts make it 64"),
    "anyres": (_edit_config(image_aspect_ratio="anyres"), r"image_aspect_ratio is 'anyres'"),
    "start and end tokens": (_edit_config(mm_use_im_start_end=True), r"mm_use_im_start_end is True"),
    "another denoiser": (_edit_config(mm_inv_projector_type="denoiser_vit4x"), r"missing 10: .*net\.blocks\.3"),
    "a list for a name": (_edit_config(mm_vision_tower=["a"]), r"mm_vision_tower is \['a'\], it must be a text"),
}


@pytest.mark.parametrize("mistake", COMPOSITE_MISTAKES)
def test_composite_mistakes(mistake: str, golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, message = COMPOSITE_MISTAKES[mistake]
    folder = shutil.copytree(golden_dir / "ross_qwen2_siglip", tmp_path / "composite")
    shutil.copytree(golden_dir / "vision_siglip", tmp_path / "vision_siglip")
    edit(folder)
    options = {} if "outside" in mistake or "elsewhere" in mistake else {"vision_tower": golden_dir / "vision_siglip"}
    error = _convert(tmp_path / "out" / "x", capsys, checkpoint=folder, vae=golden_dir / "vae", **options)
    assert _matches(message, error), error


def test_options_that_do_not_go_together(golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "x"
    assert "give --checkpoint, or both" in _convert(output, capsys, llm=golden_dir / "llm_qwen2")
    both = {"checkpoint": golden_dir / "ross_qwen2_siglip", "llm": golden_dir / "llm_qwen2"}
    assert "--checkpoint is a whole model" in _convert(output, capsys, **both)
    assert "checkpoint='nowhere at all': no such folder" in _convert(output, capsys, checkpoint="nowhere at all")
    offline = _convert(output, capsys, checkpoint="nobody/nothing")
    assert "checkpoint='nobody/nothing': no such folder, and as a hub id it cannot be" in offline


class _Hostile:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_code_in_a_pickle_is_refused_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"weight": _Hostile(trap)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a readable torch file"):
        WeightFolder(tmp_path)
    assert not trap.exists()
    torch.save({"weight": 1.0}, tmp_path / "numbers.bin")
    with pytest.raises(ValueError, match="flat dict of tensors"):
        load_torch_tensors(tmp_path / "numbers.bin")


@pytest.fixture
def golden_arguments(golden_dir: Path) -> dict[str, str]:
    return {"llm": str(golden_dir / "llm_qwen2"), "vision_tower": str(golden_dir / "vision_siglip")}


def test_existing_output_is_kept(golden_arguments: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already exists"):
        import_checkpoint(tmp_path / "out", **golden_arguments)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_too_little_space_is_found_before_writing(
    golden_arguments: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"0\.0 GB left, the output needs"):
        import_checkpoint(tmp_path / "out", **golden_arguments)
    assert list(tmp_path.iterdir()) == []


def _limited(program: str) -> subprocess.CompletedProcess[str]:
    """Run `program` with files limited to 200 kB, which fails in the middle of writing as a full disk does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    return subprocess.run([sys.executable, "-c", limit + program], capture_output=True, text=True, check=False)


def test_disk_that_gets_full_while_importing(golden_arguments: dict[str, str], tmp_path: Path) -> None:
    arguments = [item for name, value in golden_arguments.items() for item in (f"--{name}", value)]
    arguments += ["--output", str(tmp_path / "out")]
    result = _limited(
        f"import sys; from megatron_ross.cli.import_checkpoint import main; sys.exit(main({arguments!r}))"
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: [Errno 27] cannot write: File too large")
    assert "__0_0.distcp" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_", ["ross", "adapters"])
def test_disk_that_gets_full_while_exporting(format_: str, imported: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(imported("qwen2_siglip")), "--output", str(tmp_path / "out"), "--format", format_]
    result = _limited(
        f"import sys; from megatron_ross.cli.export_checkpoint import main; sys.exit(main({arguments!r}))"
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: [Errno 27] cannot write: File too large")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_terminated_conversion_leaves_nothing(
    golden_arguments: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while the second tensor is read."""
    original = importer.write_torch_dist

    def interrupted(directory: Path, tensors: dict[str, LazyTensor], progress: Callable[[int], None]) -> None:
        key = list(tensors)[1]

        def load() -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return tensors[key].load()

        changed = {**tensors, key: LazyTensor(tensors[key].shape, tensors[key].dtype, load)}
        original(directory, changed, progress)

    monkeypatch.setattr(importer, "write_torch_dist", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(tmp_path / "out", **golden_arguments)
    assert list(tmp_path.iterdir()) == []


def _write_num_layers(directory: Path, number: int) -> None:
    manifest = Manifest.read(directory)
    model = replace(manifest.model, language=replace(manifest.model.language, num_layers=number))
    replace(manifest, model=model).write(directory)


def test_incomplete_training_checkpoint_is_refused(imported: Callable[[str], Path], tmp_path: Path) -> None:
    """A manifest whose model has a layer more than the tensors."""
    root = shutil.copytree(imported("qwen2_siglip"), tmp_path / "root")
    directory = resolve_checkpoint(root)
    _write_num_layers(directory, 5)
    for format_ in ("ross", "llava"):
        with pytest.raises(ValueError, match=r"lacks 7: decoder\.layers\.4\."):
            export_checkpoint(root, tmp_path / "out", format_, templates=str)
    _write_num_layers(directory, 3)
    with pytest.raises(ValueError, match="tensors that its manifest's model does not"):
        export_checkpoint(root, tmp_path / "out", "ross")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]

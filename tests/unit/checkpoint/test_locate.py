"""One way to name a model: what each name stands for, and the command that makes what a tool needs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from megatron_ross.checkpoint import locate
from megatron_ross.checkpoint.locate import Kind, identify, look_up, megatron_checkpoint
from megatron_ross.checkpoint.manifest import Manifest, iteration_dir, write_latest
from megatron_ross.cli import import_checkpoint as importing
from megatron_ross.cli.models import model_of
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.known_models import known_model
from megatron_ross.evaluation.exports import check_model
from megatron_ross.training.start import start_of

MODEL = known_model("qwen2-0.5b+clip-l-336")


def saved(root: Path, iteration: int, *, latest: bool = True) -> Path:
    """A checkpoint of which only the manifest is there."""
    folder = iteration_dir(root, iteration)
    folder.mkdir(parents=True)
    Manifest(iteration=iteration, model=MODEL).write(folder)
    if latest:
        write_latest(root, iteration)
    return folder


def folder(path: Path, **files: dict[str, Any]) -> str:
    path.mkdir(parents=True)
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return str(path)


ROSS = {"model_type": "ross_qwen2", "mm_vision_tower": "siglip"}
LLAVA = {"model_type": "llava", "text_config": {"model_type": "qwen2"}, "vision_config": {}}
CONFIGS: dict[Kind, dict[str, Any]] = {
    Kind.ROSS: ROSS,
    Kind.LLAVA: LLAVA,
    Kind.LANGUAGE_MODEL: {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    Kind.TOWER: {"model_type": "siglip_vision_model"},
    Kind.VAE: {"_class_name": "AutoencoderKL"},
    Kind.OTHER: {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
}
ORIGINALS = [
    {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096},
    {"model_type": "llava"},
    {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_exports_and_parts_are_told_apart_by_their_config(kind: Kind, tmp_path: Path) -> None:
    assert identify(folder(tmp_path / "x", config=CONFIGS[kind])).kind is kind


@pytest.mark.parametrize("config", ORIGINALS)
def test_original_llava_is_named_from_its_config_alone(config: dict[str, Any], tmp_path: Path) -> None:
    name = folder(tmp_path / "llava-v1.5-7b", config=config)
    with pytest.raises(ValueError, match=r"format of the original code .*megatron-ross import --checkpoint \S+/llava"):
        check_model(name)


def test_other_folders(tmp_path: Path) -> None:
    assert identify(folder(tmp_path / "lora", adapter_config={})).kind is Kind.LORA
    # The original LLaVA code saves the base model's config with an adapter.
    both = folder(tmp_path / "llava-lora", config=ORIGINALS[2], adapter_config={"base_model_name_or_path": "v/7b"})
    with pytest.raises(ValueError, match="is a LoRA adapter of 'v/7b'; merge it into its base model first"):
        check_model(both)
    assert identify(folder(tmp_path / "flux", model_index={})).kind is Kind.PIPELINE
    adapters = Path(folder(tmp_path / "adapters"))
    (adapters / "mm_projector.bin").touch()
    assert identify(adapters).kind is Kind.ADAPTERS


def test_runs_and_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    first, second = saved(root, 5), saved(root, 10)
    for name in (tmp_path / "run", root, second):
        assert megatron_checkpoint(name, "checkpoint") == second
    assert megatron_checkpoint(first, "checkpoint") == first
    assert identify(tmp_path / "run").kind is Kind.RUN
    assert {identify(path).kind for path in (root, first)} == {Kind.CHECKPOINT}


def test_a_run_that_was_killed_within_its_first_save_has_a_checkpoint(tmp_path: Path) -> None:
    only = saved(tmp_path / "run" / "checkpoints", 5, latest=False)
    assert megatron_checkpoint(tmp_path / "run", "checkpoint") == only
    assert megatron_checkpoint(tmp_path / "run" / "checkpoints", "checkpoint") == only


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is a run folder that has no checkpoint yet .*wait for the first save"):
        check_model(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        (Kind.ROSS, "megatron-ross import --checkpoint {name} --output checkpoints/x"),
        (Kind.LLAVA, "megatron-ross import --checkpoint {name} --output checkpoints/x"),
        (Kind.LANGUAGE_MODEL, "megatron-ross import --llm {name} --vision-tower TOWER --vae VAE"),
        (Kind.TOWER, "megatron-ross import --llm LLM --vision-tower {name} --vae VAE"),
        (Kind.VAE, "megatron-ross import --llm LLM --vision-tower TOWER --vae {name}"),
        (Kind.OTHER, "name a run folder, a Megatron checkpoint"),
    ],
)
@pytest.mark.parametrize("setting", ["init_from", "load"])
def test_training_names_the_converter(kind: Kind, command: str, setting: str, tmp_path: Path) -> None:
    name = folder(tmp_path / "x", config=CONFIGS[kind])
    with pytest.raises(ValueError, match=re.escape(command.format(name=name))) as error:
        start_of(RunConfig.from_flat({setting: name}))
    assert str(error.value).startswith(f"{setting}='{name}': is {kind.value}")


def test_a_hub_id_to_train_from_is_to_be_imported() -> None:
    with pytest.raises(ValueError, match="megatron-ross import --checkpoint owner/name --output checkpoints/name"):
        start_of(RunConfig.from_flat({"init_from": "owner/name"}))


def test_generation_needs_a_whole_model_and_painting_a_denoiser(tmp_path: Path) -> None:
    name = folder(tmp_path / "llm", config={"model_type": "qwen2"})
    with pytest.raises(ValueError, match=r"is a language model alone \(model_type 'qwen2'\); .*import --llm"):
        check_model(name)
    llava = folder(tmp_path / "llava", config=LLAVA)
    assert check_model(llava).kind is Kind.LLAVA
    with pytest.raises(ValueError, match=r"it has no denoiser.*megatron-ross export --checkpoint RUN --format ross"):
        check_model(llava, reconstructs=True)


@pytest.mark.parametrize(
    ("option", "make", "message"),
    [
        ("checkpoint", lambda p: folder(p, config=CONFIGS[Kind.TOWER]), "no whole model; give it as --vision-tower"),
        ("checkpoint", lambda p: folder(p, config=CONFIGS[Kind.VAE]), "no whole model; give it as --vae"),
        ("checkpoint", lambda p: folder(p, model_index={}), "no whole model; give it as --vae"),
        ("llm", lambda p: folder(p, config=ROSS), "a whole model; give it as --checkpoint"),
        ("llm", lambda p: folder(p, config=ORIGINALS[0]), "a whole model; give it as --checkpoint"),
        ("checkpoint", lambda p: str(saved(p, 3)), "nothing to import; train from it with --init-from"),
        ("vision_tower", lambda p: str(saved(p, 3)), "nothing to import"),
        ("vae", lambda p: str(p / "nowhere"), "no such folder"),
    ],
)
def test_import_says_which_option_takes_it(
    option: str, make: Callable[[Path], str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make(tmp_path / "x")
    code = importing.main([f"--{option}", name, "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {option}='{name}'")
    assert message in error


def test_weights_in_a_format_of_their_own_are_left_to_the_import(tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    weights = tmp_path / "flux" / "ae.safetensors"
    weights.touch()
    importing.check_sources(llm="owner/name", vision_tower="owner/name", vae=str(weights.parent), checkpoint=None)
    importing.check_sources(llm="owner/name", vision_tower="owner/name", vae=str(weights), checkpoint=None)


def test_a_mistyped_path_is_not_only_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "exports" / "ross-qwen2", config=ROSS)
    with pytest.raises(ValueError, match=r"no such folder \(did you mean exports/ross-qwen2\?\)"):
        megatron_checkpoint("exports/ross-qwn2", "init_from")
    monkeypatch.setattr(locate, "unreachable_hub", lambda: "HF_HUB_OFFLINE is set")
    with pytest.raises(ValueError, match=r"\(did you mean exports/ross-qwen2\?\), and as a hub id it cannot be down"):
        check_model("exports/ross-qwn2")
    for name in ("./exports/ross-qwn2", str(tmp_path / "exports/ross-qwn2"), "exports/a/b"):
        with pytest.raises(ValueError, match="no such folder") as error:
            check_model(name)
        assert "hub id" not in str(error.value)


def test_an_unreachable_hub_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself would try for half a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")
    begin = time.monotonic()
    with pytest.raises(
        ValueError, match=r"no such folder, and as a hub id it cannot be downloaded: .*refused"
    ) as error:
        check_model("nobody/nothing")
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 5


def test_a_hub_model_is_told_by_its_config_before_it_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(ORIGINALS[0]))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(config))
    assert look_up(identify("liuhaotian/llava-v1.5-7b")).kind is Kind.ORIGINAL_LLAVA
    with pytest.raises(ValueError, match="in the format of the original code"):
        check_model("liuhaotian/llava-v1.5-7b")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_no_model_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="name a run folder"):
        identify(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file; name the folder that it is in"):
        identify(tmp_path / "model.safetensors")


def test_an_architecture_may_be_named_by_any_whole_model(tmp_path: Path, golden_dir: Path) -> None:
    run = RunConfig()
    saved(tmp_path / "run" / "checkpoints", 5)
    assert model_of(run, str(tmp_path / "run")) == MODEL
    assert model_of(run, "qwen2-0.5b+clip-l-336") == MODEL
    assert model_of(RunConfig.from_flat({"init_from": str(tmp_path / "run")}), None) == MODEL
    with pytest.raises(ValueError, match=r"model='.*': is a language model alone"):
        model_of(run, str(golden_dir / "llm_qwen2"))

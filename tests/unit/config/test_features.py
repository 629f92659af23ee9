"""What settings ask of a machine, for machines made up here: choices, refusals, and the table that a run prints."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.compat import Available, probe
from megatron_ross.config.cli import ConfigError, parse_run_config
from megatron_ross.config.features import attention_environment, check_fp8_sizes, resolve_features, sequence_multiple
from megatron_ross.config.layout import parse_layout
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import resolve_layout
from megatron_ross.convert.known_models import known_model
from megatron_ross.training.feature_table import feature_rows, feature_table
from tests.helpers.golden import model_config
from tests.helpers.sources import ROOT

CPU = Available(megatron_core="0.16.1")
BARE = Available(gpu=(9, 0), cuda="13.0", megatron_core="0.19.2")
H100 = replace(
    BARE,
    transformer_engine="2.20.2",
    flash_attention="flash-attn 2.8.3",
    apex_adam=True,
    apex_wgrad=True,
    environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
)
A100 = replace(H100, gpu=(8, 0))
A100_FLASH_4 = replace(A100, flash_attention="flash-attn-4 4.0.0")
B200 = replace(H100, gpu=(10, 0))
PACKED = {"bf16": True, "packing": True}
FP8 = {"bf16": True, "fp8": "hybrid"}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "bf16": True, "packing": True}


def names(machine: Available, **flat: Any) -> tuple[str, str, str]:
    """Chosen (layers, attention, adam)."""
    features = resolve_features(RunConfig.from_flat(flat), machine)
    return features.layers.name, features.attention.name, features.adam.name


@pytest.mark.parametrize(
    ("machine", "flat", "expected"),
    [
        (CPU, {}, ("local", "local", "torch")),
        (BARE, {"bf16": True}, ("local", "local", "torch")),
        (H100, {"bf16": True}, ("transformer_engine", "auto", "transformer_engine")),
        (H100, {}, ("transformer_engine", "local", "transformer_engine")),  # no fused attention in fp32
        (H100, {"transformer_impl": "local"}, ("local", "local", "transformer_engine")),
        (replace(H100, gpu=(7, 5)), {"bf16": True}, ("transformer_engine", "local", "transformer_engine")),
        (replace(H100, transformer_engine=""), {"bf16": True}, ("local", "local", "apex")),
        (replace(H100, transformer_engine="2.8.0"), {"bf16": True}, ("local", "local", "apex")),
        (H100, {"bf16": True, "attention_backend": "flash"}, ("transformer_engine", "flash", "transformer_engine")),
        (H100, {"bf16": True, "attention_backend": "local"}, ("transformer_engine", "local", "transformer_engine")),
        (H100, {"attention_backend": "unfused"}, ("transformer_engine", "unfused", "transformer_engine")),
        (A100, PACKED, ("transformer_engine", "auto", "transformer_engine")),  # flash-attn 2
        (replace(A100, flash_attention=""), PACKED, ("transformer_engine", "local", "transformer_engine")),
        (A100_FLASH_4, PACKED, ("transformer_engine", "local", "transformer_engine")),
        (replace(A100, flash_attention=""), {"bf16": True}, ("transformer_engine", "auto", "transformer_engine")),
        (replace(H100, flash_attention=""), PACKED, ("transformer_engine", "auto", "transformer_engine")),
        (H100, {"optimizer_impl": "torch"}, ("transformer_engine", "local", "torch")),
        (H100, {"optimizer_impl": "apex"}, ("transformer_engine", "local", "apex")),
    ],
)
def test_choices(machine: Available, flat: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert names(machine, **flat) == expected


BROKEN = replace(H100, transformer_engine="", transformer_engine_error="OSError: libnccl.so.2: cannot open")

REFUSALS: list[tuple[Available, dict[str, Any], str]] = [
    # machine, settings, what the message must hold, in this order
    (CPU, {"transformer_impl": "transformer_engine"}, "transformer_impl='transformer_engine'|needs a GPU|leave it out"),
    (BARE, {"transformer_impl": "transformer_engine"}, "transformer_impl|not installed|pip install"),
    (BROKEN, {"transformer_impl": "transformer_engine"}, "transformer_impl|libnccl|reinstall|pip install"),
    (replace(H100, transformer_engine="2.8.0"), FP8, "fp8|2.8.0 is older than 2.9|pip install"),
    (CPU, FP8, "fp8='hybrid'|GPU|leave it out"),
    (BARE, FP8, "fp8='hybrid'|not installed|pip install"),
    (H100, FP8 | {"transformer_impl": "local"}, "fp8|transformer_impl=local|auto"),
    (H100, {"fp8": "e4m3"}, "fp8='e4m3'|fp32|bf16: true"),
    (A100, FP8, "fp8|needs compute capability 8.9|8.0|leave fp8 out"),
    (replace(H100, gpu=(8, 9)), FP8 | {"fp8_recipe": "blockwise"}, "fp8|blockwise|9.0|8.9|tensorwise"),
    (H100, FP8 | {"fp8_recipe": "mxfp8"}, "fp8|mxfp8|10.0|9.0|tensorwise"),
    (replace(H100, gpu=(12, 0)), FP8 | {"fp8_recipe": "mxfp8"}, "fp8_recipe='mxfp8'|12.0|tensorwise"),
    (replace(H100, cuda="12.8"), FP8 | {"fp8_recipe": "blockwise"}, "fp8_recipe='blockwise'|12.9|12.8|tensorwise"),
    (H100, FP8 | {"first_last_layers_bf16": True}, "first_last_layers_bf16=True|delayed|tensorwise"),
    (H100, {"bf16": True, "first_last_layers_bf16": True}, "first_last_layers_bf16=True|no fp8|leave it out"),
    (H100, FP8 | {"fp8_recipe": "tensorwise", "fp8_wgrad": False}, "fp8_wgrad=False|delayed|tensorwise"),
    (H100, FP8 | {"fp8_recipe": "blockwise", "fp8_amax_history_len": 16}, "fp8_amax_history_len=16|delayed"),
    (H100, FP8 | {"packing": True, "seq_length": 2056}, "seq_length=2056|multiple of 16|use 2048"),
    (CPU, {"attention_backend": "flash"}, "attention_backend='flash'|TransformerEngine|GPU|local"),
    (BARE, {"attention_backend": "fused", "bf16": True}, "attention_backend='fused'|not installed|pip install"),
    (H100, {"attention_backend": "fused"}, "attention_backend='fused'|fp32|bf16: true"),
    (replace(H100, gpu=(7, 5)), {"bf16": True, "attention_backend": "fused"}, "attention_backend|8.0|7.5|local"),
    (
        replace(H100, flash_attention=""),
        {"bf16": True, "attention_backend": "flash"},
        "attention_backend='flash'|no flash-attn|pip install|auto",
    ),
    (
        A100_FLASH_4,
        {"bf16": True, "attention_backend": "flash"},
        "attention_backend='flash'|flash-attn-4 4.0.0|9.0|auto",
    ),
    (
        A100,
        PACKED | {"attention_backend": "fused"},
        "attention_backend='fused'|9.0 for packed samples|8.0|packing: false",
    ),
    (H100, {"attention_backend": "unfused", "packing": True}, "attention_backend='unfused'|packed|flash"),
    (
        replace(H100, environment={"NVTE_FLASH_ATTN": "1"}),
        {"bf16": True, "attention_backend": "fused"},
        "attention_backend='fused'|NVTE_FLASH_ATTN=1|unset",
    ),
    (CPU, {"optimizer_impl": "apex"}, "optimizer_impl='apex'|GPU|leave it out"),
    (BARE, {"optimizer_impl": "apex"}, "optimizer_impl='apex'|not installed|APEX_CUDA_EXT"),
    (BARE, {"optimizer_impl": "transformer_engine"}, "optimizer_impl='transformer_engine'|not installed|pip install"),
    (CPU, {"overlap_param_gather": True}, "overlap_param_gather=True|overlap_grad_reduce is false|set"),
    (CPU, {"ddp_bucket_size": 1000}, "ddp_bucket_size=1000|overlap_grad_reduce"),
    (CPU, {"ddp_bucket_size": 0, "overlap_grad_reduce": True}, "ddp_bucket_size=0|at least 1"),
    (CPU, TP | {"tp_comm_overlap": True}, "tp_comm_overlap=True|GPU|leave it out"),
    (H100, TP | {"tp_comm_overlap": True, "packing": False}, "tp_comm_overlap=True|one size|packing: true"),
    (H100, TP | {"tp_comm_overlap": True, "sequence_parallel": False}, "tp_comm_overlap|sequence_parallel: true"),
    (H100, TP | FP8 | {"tp_comm_overlap": True, "fp8_recipe": "blockwise"}, "tp_comm_overlap|blockwise|tensorwise"),
    (
        B200,
        TP | FP8 | {"tp_comm_overlap": True, "fp8_recipe": "mxfp8", "seq_length": 2048 + 64},
        "seq_length=2112|multiple of 256|use 2048",
    ),
    (H100, {"bf16": True, "tp_comm_overlap": True}, "tp_comm_overlap|tensor_model_parallel_size is 1|leave it out"),
    (
        replace(H100, environment={}),
        TP | {"tp_comm_overlap": True},
        "tp_comm_overlap|CUDA_DEVICE_MAX_CONNECTIONS=None|export CUDA_DEVICE_MAX_CONNECTIONS=1",
    ),
    (CPU, {"log_straggler": True}, "log_straggler=True|no GPU|leave it out"),
    (H100, {"log_straggler": True}, "log_straggler=True|pynvml|pip install nvidia-ml-py"),
    (CPU, {"wandb_project": "ross"}, "wandb_project='ross'|not installed|pip install -e '.[wandb]'"),
    (CPU, {"gradient_accumulation_fusion": True}, "gradient_accumulation_fusion=True|Apex|leave it out"),
    (BARE, {"gradient_accumulation_fusion": True}, "gradient_accumulation_fusion=True|not installed|pip install|Apex"),
    (CPU, {"recompute_granularity": "full"}, "recompute_granularity='full'|recompute_method|uniform"),
    (
        CPU,
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        "recompute_num_layers=None|how many|1 or more",
    ),
    (CPU, {"recompute_granularity": "selective", "recompute_num_layers": 1}, "recompute_num_layers=1|full|leave"),
    (CPU, {"recompute_method": "block"}, "recompute_method='block'|full|leave"),
    (CPU, {"recompute_modules": ["mlp"]}, "recompute_modules=['mlp']|granularity is None|selective"),
    (
        CPU,
        {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]},
        "recompute_modules=['mlp', 'layernorm']|core_attn, mlp",
    ),
    (
        CPU,
        {"vision_tower_dtype": "tf32", "unfreeze_mm_vision_tower": True},
        "vision_tower_dtype='tf32'|trained|fp32 or bf16",
    ),
]


@pytest.mark.parametrize(("machine", "flat", "parts"), REFUSALS, ids=[case[2][:40] for case in REFUSALS])
def test_refusals_name_setting_reason_and_fix(machine: Available, flat: dict[str, Any], parts: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_features(RunConfig.from_flat(flat), machine)
    message = str(raised.value)
    assert "\n" not in message
    position = 0
    for part in parts.split("|"):
        assert part in message[position:], f"{part!r} is missing, or too early, in: {message}"
        position = message.index(part, position) + len(part)


@pytest.mark.parametrize(
    ("machine", "flat"),
    [
        (H100, FP8),
        (H100, FP8 | {"fp8_recipe": "blockwise", "first_last_layers_bf16": True}),
        (B200, FP8 | {"fp8_recipe": "mxfp8"}),
        (H100, FP8 | {"fp8_wgrad": False, "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}),
        (H100, TP | FP8 | {"tp_comm_overlap": True}),
        (replace(B200, environment={}), TP | {"tp_comm_overlap": True}),
        (BARE, {"vision_tower_dtype": "tf32"}),
        (H100, {"gradient_accumulation_fusion": True}),
        (replace(BARE, apex_wgrad=True), {"gradient_accumulation_fusion": True}),
        (CPU, {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}),
        (CPU, {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1000}),
    ],
)
def test_what_a_machine_can_do_is_accepted(machine: Available, flat: dict[str, Any]) -> None:
    resolve_features(RunConfig.from_flat(flat), machine)


def test_fp8_pads_sequences_so_that_every_rank_can_multiply() -> None:
    def multiple(**flat: Any) -> int:
        return sequence_multiple(RunConfig.from_flat(flat))

    assert (multiple(), multiple(tensor_model_parallel_size=4)) == (1, 1)
    assert multiple(tensor_model_parallel_size=4, sequence_parallel=True) == 4
    assert multiple(**FP8) == 16
    assert multiple(**FP8, fp8_recipe="mxfp8") == 32
    assert multiple(**FP8, fp8_recipe="blockwise", tensor_model_parallel_size=2, sequence_parallel=True) == 256


def test_fp8_sizes_and_layers_are_checked_against_the_model() -> None:
    language = model_config("qwen2_siglip").language
    wide = replace(language, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, kv_channels=32, num_layers=4)
    layout = parse_layout("VEt*2|t*2NH", num_layers=4, pipeline_model_parallel_size=2, has_denoiser=False)
    tensorwise = FP8 | {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    check_fp8_sizes(RunConfig.from_flat(tensorwise), wide, layout)
    with pytest.raises(ConfigError, match=r"fp8='hybrid': each rank's hidden_size is 72, .* multiples of 16; leave"):
        check_fp8_sizes(RunConfig.from_flat(FP8), replace(wide, hidden_size=72), layout)
    with pytest.raises(ConfigError, match=r"ffn_hidden_size is 24.*tensor_model_parallel_size"):
        check_fp8_sizes(RunConfig.from_flat(FP8 | {"tensor_model_parallel_size": 4}), wide, layout)
    with pytest.raises(ConfigError, match=r"num_layers_at_end_in_bf16=3: a pipeline rank has 2 layers; use 0 to 2"):
        check_fp8_sizes(RunConfig.from_flat(tensorwise | {"num_layers_at_end_in_bf16": 3}), wide, layout)


def test_the_environment_tells_transformer_engine_its_attention() -> None:
    assert attention_environment("auto") == attention_environment("local") == {}
    assert attention_environment("fused") == {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}


def table(machine: Available, ranks: int, text: str = "VEt*4NDH", pp: int = 1, **flat: Any) -> dict[str, tuple]:
    """{feature: (state, why)} as printed."""
    run = RunConfig.from_flat(flat)
    layout = parse_layout(text, num_layers=4, pipeline_model_parallel_size=pp, has_denoiser=True)
    rows = feature_rows(run, resolve_features(run, machine), machine, layout, ranks)
    printed = feature_table(rows).splitlines()
    assert printed[0].split() == ["feature", "on/off", "why"]
    assert len(printed) == len(rows) + 1
    for line, row in zip(printed[1:], rows, strict=True):
        assert line.split("  ")[0] == row.feature
        assert line.endswith(row.why)
    return {row.feature: (row.state, row.why) for row in rows}


def test_table_of_a_cpu() -> None:
    rows = table(CPU, 1)
    assert rows["TransformerEngine layers"] == ("off", "TransformerEngine needs a GPU, and torch sees none")
    assert rows["attention"][0] == rows["fused AdamW"][0] == "PyTorch"
    assert rows["FP8 products in the decoder"] == ("off", "fp8=None")
    assert rows["Triton kernels"][0] == "off"
    assert rows["decoder precision"] == ("fp32", "bf16=False")
    assert rows["gradient reduction overlap"] == (
        "off",
        "overlap_grad_reduce=False: data-parallel size 1, nothing is sent",
    )
    assert all(why for _, why in rows.values())


def test_table_of_a_gpu() -> None:
    rows = table(
        H100,
        8,
        text="VEt|t|t|tNDH",
        pp=2,
        **TP,
        fp8="hybrid",
        fp8_recipe="tensorwise",
        first_last_layers_bf16=True,
        num_layers_at_end_in_bf16=2,
        attention_backend="flash",
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        tp_comm_overlap=True,
        gradient_accumulation_fusion=True,
        recompute_granularity="selective",
        vision_tower_dtype="tf32",
        denoiser_dtype="tf32",
        latent_cache="cache",
    )
    assert rows["TransformerEngine layers"] == ("on", "TransformerEngine 2.20.2")
    assert rows["attention"][0] == "flash-attn"
    assert rows["fused AdamW"][0] == "TransformerEngine"
    assert rows["gradient accumulation fusion"] == ("on", "gradient_accumulation_fusion=True: TransformerEngine's")
    assert rows["FP8 products in the decoder"] == (
        "on",
        "fp8=hybrid: recipe tensorwise, 1 first and 2 last layers in bf16",
    )
    assert (rows["vision tower precision"][0], rows["denoiser precision"][0]) == ("tf32", "tf32")
    assert rows["recomputation"][0] == "on"
    assert "little to gain" in rows["recomputation"][1]
    for feature in (
        "gradient reduction overlap",
        "parameter gather overlap",
        "tensor-parallel overlap",
        "sequence parallelism",
        "pipeline send overlap",
        "packing",
        "cached latents",
    ):
        assert rows[feature][0] == "on", feature


def test_table_says_why_a_gpu_without_packages_is_slow() -> None:
    rows = table(BARE, 8, bf16=True)
    assert rows["TransformerEngine layers"] == ("off", "TransformerEngine is not installed")
    assert rows["attention"][0] == "PyTorch"
    assert "not installed" in rows["attention"][1]
    assert rows["fused AdamW"][0] == "PyTorch"
    assert "Apex is not installed" in rows["fused AdamW"][1]


def test_probe_agrees_with_this_machine() -> None:
    found = probe()
    assert found.megatron_core
    resolve_features(RunConfig(), found)  # the defaults run anywhere
    if found.gpu is None:
        assert (found.transformer_engine, found.apex_adam, found.apex_wgrad) == ("", False, False)


def test_a_refusal_comes_before_any_process_group(tmp_path: Path) -> None:
    """Rank 0 of two, whose peer never starts: a process group would wait for it."""
    (tmp_path / "data.json").write_text("[]")
    Manifest(iteration=0, model=known_model("qwen2-0.5b+clip-l-336")).write(tmp_path)
    flags = ["--data-path", str(tmp_path / "data.json"), "--init-from", str(tmp_path), "--fp8", "hybrid", "--bf16"]
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, ROOT / "pretrain_ross.py", *flags],
        env=os.environ | ranks,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: fp8='hybrid': needs TransformerEngine's layers, and TransformerEngine needs a GPU")


def test_settings_come_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "fp8: e4m3\nfp8_recipe: tensorwise\nfirst_last_layers_bf16: true\nrecompute_modules: [core_attn, mlp]\n"
        "attention_backend: fused\noptimizer_impl: apex\ntp_comm_overlap: true\nvision_tower_dtype: bf16\n"
    )
    run = parse_run_config(["--config", str(path), "--fp8-recipe", "blockwise"])
    assert (run.compute.fp8, run.compute.fp8_recipe, run.compute.first_last_layers_bf16) == ("e4m3", "blockwise", True)
    assert run.compute.recompute_modules == ["core_attn", "mlp"]
    assert (run.optimizer.optimizer_impl, run.parallel.tp_comm_overlap) == ("apex", True)
    with pytest.raises(ConfigError, match="fp8"):
        parse_run_config(["--fp8", "e5m2"])


@pytest.mark.parametrize(
    ("layout", "pp", "size", "works"),
    [
        ("VEt*4NDH", 1, 3, "1, 2, 4"),
        ("VEt*4NDH", 1, 5, "1, 2, 4"),
        ("VEt|t*3NDH", 2, 3, "1"),
        ("VE|t*2|t*2NH|D", 2, 4, "1, 2"),
    ],
)
def test_groups_that_do_not_divide_a_stage_are_refused(layout: str, pp: int, size: int, works: str) -> None:
    """Megatron would ask for a layer beyond the last: IndexError in the first step."""
    with pytest.raises(ConfigError) as refused:
        resolve_layout(recomputing(layout, pp, "uniform", size), model_config("qwen2_siglip"), pp)
    message = str(refused.value)
    assert message.startswith(f"recompute_num_layers={size}: recompute_method=uniform")
    assert message.endswith(f"; use {works}, or recompute_method: block")
    assert "\n" not in message
    for allowed in map(int, works.split(", ")):
        resolve_layout(recomputing(layout, pp, "uniform", allowed), model_config("qwen2_siglip"), pp)


def test_blocks_of_layers_need_not_divide_a_stage() -> None:
    resolve_layout(recomputing("VEt|t*3NDH", 2, "block", 2), model_config("qwen2_siglip"), 2)


def recomputing(layout: str, pp: int, method: str, size: int) -> RunConfig:
    recompute = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": size}
    return RunConfig.from_flat(
        {"layout": layout, "pipeline_model_parallel_size": pp, "global_batch_size": 8, **recompute}
    )

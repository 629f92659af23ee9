"""Settings of any kind: one message that names the setting, or a run within bounds; never another error or a hang."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ross.config.blend import data_sources
from megatron_ross.config.cli import ConfigError, parse_run_config
from megatron_ross.config.limits import LIMITS, check_limits
from megatron_ross.config.paths import MAX_FILES, expand_braces
from megatron_ross.config.schema import SECTIONS, DataConfig, RunConfig
from megatron_ross.config.validate import validate_run
from megatron_ross.config.yaml_safety import check_yaml_file
from tests.helpers.hostile import ABSURD, at_most, attempt, json_values

NAMES = [f.name for section in SECTIONS.values() for f in dataclasses.fields(section)]
NUMBERS = [
    f.name
    for section in SECTIONS.values()
    for f in dataclasses.fields(section)
    if any(kind in str(f.type) for kind in ("int", "float")) and "Literal" not in str(f.type)
]


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    (tmp_path / "data.json").touch()
    return tmp_path / "run.yaml"


def _start(file: Path, text: str | bytes) -> RunConfig | None:
    """The run if the settings are accepted, as a start would; None if they are refused with a message."""
    file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    run, message = attempt(ConfigError, _validated, file)
    assert len(message) < 2000
    return run


def _validated(file: Path) -> RunConfig:
    run = parse_run_config(["--config", str(file)])
    validate_run(run, world_size=8)
    return run


def _valid(file: Path, **changes: Any) -> str:
    needed = {"data_path": str(file.parent / "data.json"), "init_from": "x"}
    return yaml.safe_dump(needed | changes, allow_unicode=True)


@settings(max_examples=50)
@given(text=st.text(max_size=200))
def test_any_text(text: str, settings_file: Path) -> None:
    _start(settings_file, text)


@settings(max_examples=50)
@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes, settings_file: Path) -> None:
    _start(settings_file, data)


@given(document=json_values(*NAMES))
def test_documents_of_any_shape(document: Any, settings_file: Path) -> None:
    _start(settings_file, json.dumps(document))


@pytest.mark.parametrize("name", NAMES)
def test_absurd_values_of_every_setting_in_a_file(name: str, settings_file: Path) -> None:
    for value in (10**18, None, "x", {"a": [1]}):
        run = _start(settings_file, _valid(settings_file, **{name: value}))
        assert run is None or run.to_flat()[name] == value


@pytest.mark.parametrize("name", LIMITS)
def test_accepted_numbers_lie_within_bounds(name: str) -> None:
    limit = LIMITS[name]
    for value in ABSURD:
        _, message = attempt(ConfigError, check_limits, RunConfig.from_flat({name: value}))
        if message:
            assert message.startswith(f"{name}=")
        elif value is not None:
            assert value <= limit.high
            assert limit.low is None or limit.low <= value


def test_every_number_has_bounds() -> None:
    """A new number is either bounded in config/limits.py or checked as a share of samples."""
    assert set(NUMBERS) - set(LIMITS) == {"max_bad_sample_share", "max_mismatch_share"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seq_length", 10**18, "seq_length=1000000000000000000: must be at most 16,777,216, because a microbatch"),
        ("tensor_model_parallel_size", -1, "tensor_model_parallel_size=-1: must be at least 1"),
        ("tensor_model_parallel_size", 2**62, "tensor_model_parallel_size=4611686018427387904: must be at most 4,096"),
        ("micro_batch_size", 0, "micro_batch_size=0: must be at least 1"),
        ("num_noise_draws", 10**9, "num_noise_draws=1000000000: must be at most 1,024, because the denoiser"),
        ("num_workers", 10**9, "num_workers=1000000000: must be at most 1,024, because each is a thread"),
        ("lr", float("nan"), "lr=nan: must be a number"),
        ("lr", float("inf"), "lr=inf: must be at most 100"),
        ("min_lr", float("nan"), "min_lr=nan: must be a number"),
        ("weight_decay", float("nan"), "weight_decay=nan: must be a number"),
        ("adam_beta2", 1.0, "adam_beta2=1.0: must be at most"),
        ("clip_grad", float("nan"), "clip_grad=nan: must be a number"),
        ("num_epochs", float("inf"), "num_epochs=inf: must be at most 1,000,000.0, because no run"),
        ("distributed_timeout_minutes", 1e300, "distributed_timeout_minutes=1e+300: must be at most 43,200"),
        ("seed", 2**70, "seed=1180591620717411303424: must be at most"),
        ("virtual_pipeline_model_parallel_size", 0, "virtual_pipeline_model_parallel_size=0: must be at least 1"),
        ("data_path", "{0..99999999999}.tar", "data_path='{0..99999999999}.tar': its braces stand for more than"),
        ("data_path", "x" * 5000, "data_path='xxx"),
        ("image_folder", "a\0b", r"image_folder='a\x00b': no such folder"),
        ("lr", None, "lr=null: must have a value; leave it out for the default"),
    ],
)
def test_messages_name_the_setting_and_the_limit(name: str, value: Any, message: str, settings_file: Path) -> None:
    settings_file.write_text(_valid(settings_file, **{name: value}))
    with pytest.raises(ConfigError) as caught:
        validate_run(parse_run_config(["--config", str(settings_file)]), world_size=8)
    assert str(caught.value).startswith(message)


BILLION = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: !!python/object/apply:pathlib.Path.touch [{trap}]", "line 1: the tag .*python/object.* is refused"),
        ("blend: [!!python/name:os.system '']", "line 1: the tag .*python/name.* is refused"),
        ("lr: !evil 3", "line 1: the tag '!evil' is refused"),
        (BILLION, "unfolds to more than 100,000 values"),
        ("blend: &a [*a]", "a value refers to itself"),
        ("lr: " + "[" * 5000, "nested too deeply"),
        ("lr: 3\n" * 400_000, "more than 1,048,576 bytes"),
        ("seed: 0x" + "f" * 5000, "a number of 5002 digits"),
        ("config: other.yaml", "cannot name another by `config`"),
        ("- lr", "must hold settings, one `name: value` on a line"),
        ('lr: "\\ud800', "is not valid YAML"),
    ],
    ids=["code", "name", "tag", "billion laughs", "circle", "deep", "long", "digits", "config", "list", "cut"],
)
def test_hostile_yaml_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "run.yaml"
    file.write_text(text.replace("{trap}", str(trap)))
    with pytest.raises(ConfigError, match=message) as caught:
        parse_run_config(["--config", str(file)])
    assert str(file) in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize("flag", ["--lr", "--blend", "--recompute-modules", "--config", "--data-path"])
@pytest.mark.parametrize("value", ["[" * 3000, "1" * 6000, "{", "!!python/name:os.system", "&a [*a]", "\ud800"])
def test_hostile_flags_are_refused_or_plain(flag: str, value: str) -> None:
    run, _ = attempt(ConfigError, parse_run_config, [flag, value])
    assert run is None or run.data.data_path == value


def test_a_blend_with_the_form_of_a_class_imports_nothing(settings_file: Path) -> None:
    settings_file.write_text("blend: [{data_path: {class_path: this.module, init_args: {}}, epochs: 1}]")
    with pytest.raises(ValueError, match=r"blend\[0\]\.data_path=.*must be a path"):
        data_sources(parse_run_config(["--config", str(settings_file)]).data)


@given(entries=st.lists(json_values("data_path", "image_folder", "weight", "epochs").filter(lambda v: type(v) is dict)))
@example(entries=[{"data_path": "a", "weight": 10**400}])
@example(entries=[{"data_path": "a", "epochs": 1e300}])
def test_blends_of_any_shape(entries: list[dict[str, Any]]) -> None:
    sources, message = attempt(ValueError, data_sources, DataConfig(blend=entries))
    if sources is None:
        assert message.startswith(("blend", "data_path=''"))
    else:
        assert all((source.weight or source.epochs or 0) <= 1e12 for source in sources)


@given(pattern=st.text("{}.0123456789a²", max_size=40))
@example(pattern="{0..999}{0..999}{0..999}")
@example(pattern="{0.." + "9" * 5000 + "}")
def test_braces_never_stand_for_too_many_files(pattern: str) -> None:
    with at_most(64):
        names, message = attempt(ValueError, expand_braces, pattern)
    assert "more than 100,000 files" in message if names is None else len(names) <= MAX_FILES


def test_references_and_merges_are_welcome(tmp_path: Path) -> None:
    """What YAML has them for still works."""
    (tmp_path / "run.yaml").write_text("blend: [&a {data_path: x, epochs: 1}, {<<: *a, epochs: 2}]")
    check_yaml_file(tmp_path / "run.yaml")
    run = parse_run_config(["--config", str(tmp_path / "run.yaml")])
    assert run.data.blend == [{"data_path": "x", "epochs": 1}, {"data_path": "x", "epochs": 2}]

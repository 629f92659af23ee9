"""Settings on the command line and in files: order, recipes, names of other programs, help, and the page in docs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from megatron_ross.cli.settings_page import settings_page
from megatron_ross.config import other_names, recipes
from megatron_ross.config.cli import ConfigError, build_parser, parse_run_config
from megatron_ross.config.schema import SECTIONS
from tests.helpers.sources import ROOT

NAMES = {field.name for section in SECTIONS.values() for field in fields(section)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "a.yaml").write_text("lr: 1.0\nseed: 1\nmicro_batch_size: 3\n")
    (tmp_path / "b.yaml").write_text("lr: 2.0\nseed: 2\n")
    return str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")


@pytest.mark.parametrize("spelling", ["two words", "one word"])
def test_files_are_read_in_order_and_flags_between_them_count_where_they_stand(
    files: tuple[str, str], spelling: str
) -> None:
    def config(path: str) -> list[str]:
        return ["--config", path] if spelling == "two words" else [f"--config={path}"]

    a, b = files
    run = parse_run_config([*config(a), *config(b)])
    assert (run.optimizer.lr, run.loss.seed, run.data.micro_batch_size) == (2.0, 2, 3)
    assert parse_run_config([*config(b), *config(a)]).optimizer.lr == 1.0
    assert parse_run_config([*config(a), "--lr", "9", *config(b)]).optimizer.lr == 2.0
    assert parse_run_config([*config(a), *config(b), "--lr", "9"]).optimizer.lr == 9.0


def test_a_recipe_is_the_file_of_its_name() -> None:
    names = recipes.recipe_names()
    expected = {f"{f}/{p.stem}" for f in recipes.FOLDERS for p in (ROOT / "examples" / f).glob("*.yaml")}
    assert set(names) == expected
    assert len(names) >= 20
    assert {"images/tune_siglip_qwen2", "llava/finetune_clip_qwen2", "ross/pretrain_clip_vicuna"} <= set(names)
    for name in names:
        by_file = parse_run_config(["--config", str(ROOT / "examples" / f"{name}.yaml")])
        assert parse_run_config(["--config", f"recipe:{name}"]) == by_file
        assert parse_run_config([f"--config=recipe:{name}.yaml"]) == by_file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "recipe:ross/finetune_siglip_qwen"], "did you mean ross/finetune_siglip_qwen2?"),
        (["--config", "recipe:zzz"], "config=recipe:zzz: no such recipe; there are images/tune_siglip_qwen2, "),
        (["--config", "recipe:../setup"], "no such recipe"),
        (["--config", "nowhere.yaml"], "config='nowhere.yaml': no such file"),
        (["--config", "nowhere"], "config='nowhere': no such file"),
        (["--config", str(ROOT / "docs")], "is a folder; name a YAML file"),
        (["--micro-batchsize", "3"], "micro_batchsize: no such setting; did you mean micro_batch_size?"),
        (["--num-layers", "3"], "num_layers: no such setting; the checkpoint defines the model"),
        (["--hidden-size=3"], "hidden_size: no such setting; the checkpoint defines the model"),
        (["--learning_rate", "3"], "learning_rate: no such setting; it is called lr"),
        (["--micro-batch", "3"], "micro_batch: no such setting; did you mean"),  # no abbreviations
        (["stage1.yaml"], "'stage1.yaml': stands alone; every value follows its --NAME"),
        (["--zzz"], "zzz: no such setting; --help lists them all"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_run_config(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_of_files_are_answered_alike(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for line, answer in (("num_layers: 3", "the checkpoint defines the model"), ("lrr: 1", "did you mean lr?")):
        path.write_text(line)
        with pytest.raises(ConfigError, match="no such setting; " + answer.replace("?", r"\?")):
            parse_run_config(["--config", str(path)])


def test_other_names_are_no_settings_and_lead_to_settings() -> None:
    others = {*other_names._MODEL_SETTINGS.split(), *other_names._NAMES}
    assert not others & NAMES
    for answer in other_names._NAMES.values():
        if answer.startswith("it is called "):
            assert answer.removeprefix("it is called ") in NAMES


def test_help_has_the_text_of_every_setting_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser("")
    texts = {action.dest: action.help or "" for action in parser._actions}
    assert not [name for name in NAMES if len(texts[name]) < 10], "write a docstring below the field in schema.py"
    with pytest.raises(SystemExit):
        parse_run_config(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for section in SECTIONS.values():
        assert str(section.__doc__).splitlines()[0].rstrip(".") in out
    assert "Samples (or packs) of one optimizer step, over all ranks." in out


def test_the_settings_page_is_current() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), "run python tools/settings_page.py"
    assert all(f"| `{name}` |" in settings_page() for name in NAMES)

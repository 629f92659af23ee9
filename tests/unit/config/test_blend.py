"""Blends in YAML and flags: what is accepted, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ross.config.blend import data_sources
from megatron_ross.config.cli import ConfigError, parse_run_config, write_resolved
from megatron_ross.config.schema import DataConfig, RunConfig
from megatron_ross.config.validate import validate_run

BY_EPOCHS = [{"data_path": "a.json", "image_folder": "images", "epochs": 2}, {"data_path": "b.jsonl", "epochs": 0.5}]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.jsonl", "s-00.tar", "s-01.tar"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    return tmp_path


def check(blend: Any, **data: Any) -> None:
    validate_run(RunConfig.from_flat({"blend": blend, "init_from": "x", **data}), world_size=1)


def test_yaml_and_flags_agree_and_settings_round_trip(files: Path) -> None:
    (files / "run.yaml").write_text(yaml.safe_dump({"blend": BY_EPOCHS}))
    run = parse_run_config(["--config", "run.yaml"])
    assert run.data.blend == BY_EPOCHS
    flag = "[{data_path: a.json, image_folder: images, epochs: 2}, {data_path: b.jsonl, epochs: 0.5}]"
    assert parse_run_config(["--blend", flag]) == run
    write_resolved(run, files / "resolved.yaml")
    assert parse_run_config(["--config", "resolved.yaml"]) == run


def test_sources() -> None:
    first, second = data_sources(DataConfig(blend=BY_EPOCHS))
    assert (first.data_path, first.image_folder, first.epochs, first.weight) == ("a.json", "images", 2, None)
    assert (second.data_path, second.image_folder, second.epochs) == ("b.jsonl", "", 0.5)
    (alone,) = data_sources(DataConfig(data_path="a.json", image_folder="images"))
    assert (alone.data_path, alone.image_folder, alone.epochs) == ("a.json", "images", 1.0)


def test_accepted() -> None:
    check(BY_EPOCHS)
    check([{"data_path": "a.json", "weight": 3}, {"data_path": "s-{00..01}.tar", "weight": 0}])
    check([{"data_path": "s3://bucket/a.json", "image_folder": "s3://bucket/images", "weight": 1.5}])
    check([], data_path="s-{00..01}.tar")
    check([], data_path="gs://bucket/s-{00..01}.tar")


A, B = ({"data_path": name, "weight": 1} for name in ("a.json", "b.jsonl"))


@pytest.mark.parametrize(
    ("blend", "data", "message"),
    [
        ([A], {"data_path": "a.json"}, "data_path='a.json': blend is set, too; leave data_path out, each source"),
        ([A], {"image_folder": "images"}, "image_folder='images': blend is set, too; leave image_folder out"),
        ([A, B | {"wieght": 2}], {}, r"blend[1].wieght=2: no such key; a source has data_path, image_folder, weight"),
        ([A, {"weight": 1}], {}, "blend[1].data_path='': name the source's JSON, JSONL, parquet or tar file"),
        ([{"data_path": 3, "weight": 1}], {}, "blend[0].data_path=3: must be a path"),
        ([A, B | {"weight": -1}], {}, "blend[1].weight=-1: must be a number, and not negative"),
        ([A | {"weight": "two"}], {}, "blend[0].weight='two': must be a number"),
        ([A | {"weight": True}], {}, "blend[0].weight=True: must be a number"),
        ([A | {"weight": float("nan")}], {}, "blend[0].weight=nan: must be a number"),
        ([{"data_path": "a.json"}], {}, "blend[0]: has neither weight nor epochs; give it one of the two"),
        ([A | {"epochs": 2}], {}, "blend[0]: has weight=1 and epochs=2; give it one of the two"),
        ([A, {"data_path": "b.jsonl", "epochs": 2}], {}, "blend[1].epochs=2: blend[0] has weight; give all sources"),
        ([A | {"weight": 0}, B | {"weight": 0}], {}, "blend: weight of every source is 0; give at least one"),
        ([A, B | {"data_path": "gone.json"}], {}, "blend[1].data_path='gone.json': no such file"),
        ([A | {"data_path": "s-{00..02}.tar"}], {}, "blend[0].data_path='s-02.tar': no such file"),
        ([A | {"image_folder": "gone"}], {}, "blend[0].image_folder='gone': no such folder; give the root"),
        ([], {}, "data_path='': name the LLaVA-format JSON file to train on, or list sources under blend"),
    ],
)
def test_every_mistake_is_one_line(blend: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(blend, **data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["blend: a.json", "blend: {data_path: a.json}", "blend: [a.json]"])
def test_other_than_a_list_of_mappings(files: Path, text: str) -> None:
    (files / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^blend=.*: must be (list|dict)") as caught:
        parse_run_config(["--config", "run.yaml"])
    assert "\n" not in str(caught.value)

"""The quickstart's data: the same for the same seed, true to what is drawn, and no leak into the held-out split."""

from __future__ import annotations

import json

import conversations
import drawing
import make_data
import numpy as np
import pytest
import scenes
from PIL import Image


def test_scene_survives_json_and_depends_on_seed_and_index_only() -> None:
    scene = scenes.make_scene(3, 17)
    assert scenes.Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene
    assert scenes.make_scene(3, 17) == scene
    assert scenes.make_scene(3, 18) != scene
    assert scenes.make_scene(4, 17) != scene


def test_items_have_quadrants_of_their_own_and_lie_in_them() -> None:
    for index in range(200):
        scene = scenes.make_scene(0, index)
        items = [*scene.shapes, scene.digit]
        assert len({item.quadrant for item in items}) == len(items)
        assert len({item.kind for item in items}) == len(items)
        for item in items:
            assert ("right" in item.quadrant) == (item.center[0] > 0.5)
            assert ("bottom" in item.quadrant) == (item.center[1] > 0.5)


def test_drawn_shapes_have_their_colour_where_they_should_be() -> None:
    for index in range(20):
        scene = scenes.make_scene(0, index)
        pixels = np.asarray(drawing.draw_scene(scene)).astype(int)
        assert pixels.shape == (scene.canvas[1], scene.canvas[0], 3)
        for item in scene.shapes:
            x, y = (round(fraction * side) for fraction, side in zip(item.center, scene.canvas, strict=True))
            assert np.abs(pixels[y, x] - scenes.COLORS[item.value]).max() <= 3


def test_questions_are_answered_by_the_scene() -> None:
    rng = np.random.default_rng(0)
    for index in range(100):
        scene = scenes.make_scene(0, index)
        asked = conversations.questions(scene, rng)
        by_kind = {item.kind: item for item in scene.shapes}
        by_quadrant = {item.quadrant: item for item in scene.shapes}
        assert by_kind[asked["color"][0].removeprefix("What color is the ").rstrip("?")].value == asked["color"][1]
        assert by_kind[asked["position"][0].removeprefix("Where is the ").rstrip("?")].quadrant == asked["position"][1]
        assert (
            by_quadrant[asked["shape"][0].removeprefix("Which shape is at the ").rstrip("?")].kind == asked["shape"][1]
        )
        assert scenes.NUMBER_WORDS.index(asked["count"][1]) == len(scene.shapes)
        text = conversations.caption(scene, rng)
        assert all(f"a {s.value} {s.kind} at the {s.quadrant}" in text for s in scene.shapes)


def test_records_are_llava_records_and_heldout_images_stay_held_out() -> None:
    names = make_data.image_names(60, 10)
    splits = make_data.build_records([scenes.make_scene(0, i) for i in range(60)], names, seed=0)
    assert splits == make_data.build_records([scenes.make_scene(0, i) for i in range(60)], names, seed=0)
    images = {split: {r["image"] for r in records if "image" in r} for split, records in splits.items()}
    assert len(images["heldout"]) == 10
    assert images["stage1"] == images["stage2"]
    assert not images["stage1"] & images["heldout"]
    assert sum("image" not in r for r in splits["stage2"]) == 5
    for record in (r for records in splits.values() for r in records):
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert sum(t["value"].count("<image>") for t in turns) == int("image" in record)
    assert {len(r["conversations"]) for r in splits["stage2"] if "image" in r} == {2 * conversations.TURNS_PER_RECORD}


def test_same_seed_same_bytes(tmp_path) -> None:
    for run in ("a", "b"):
        make_data._write_image((make_data.draw_quickstart, tmp_path / f"{run}.jpg", 5, 7))
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    make_data._write_image((make_data.draw_quickstart, tmp_path / "c.jpg", 5, 8))
    assert (tmp_path / "a.jpg").read_bytes() != (tmp_path / "c.jpg").read_bytes()
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"


def test_held_out_count_must_fit(tmp_path) -> None:
    with pytest.raises(ValueError, match="--num_heldout 5 must be at least 1 and below --num_images 5"):
        make_data.make_data(tmp_path, num_images=5, num_heldout=5)

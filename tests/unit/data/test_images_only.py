"""`lm_loss_weight: 0`: records without an answer, or with images alone, and no token with a label."""

from __future__ import annotations

import json

import pytest
import torch
from ross_kernels.noise_mse.noise import MAX_IMAGES_PER_SAMPLE as KEYS_OF_A_SAMPLE

from megatron_ross.config.model import IMAGE_TOKEN_ID, MAX_IMAGES_PER_SAMPLE
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import RecordError
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.quarantine import BadSamplePolicy
from megatron_ross.data.survey import survey_dataset

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
FORMS = [
    {"image": "1.png"},
    {"image": "1.png", "conversations": []},
    {"image": "1.png", "conversations": None},
    {"image": ["1.png", "2.png"]},
    {"image": "1.png", "conversations": [QUESTION]},
    {"image": "1.png", "conversations": [QUESTION, {"from": "gpt", "value": ""}]},
]


def _dataset(folder, records, tokenizer, processor, template, **settings):
    (folder / "data.json").write_text(json.dumps(records))
    return RossDataset(folder / "data.json", folder / "images", tokenizer, template, processor, 16, 512, **settings)


@pytest.mark.parametrize(("template", "name"), [("qwen_2", "qwen"), ("v1", "vicuna"), ("plain", "qwen")])
def test_records_need_no_answer(request, toy, processor, template, name):
    dataset = _dataset(toy, FORMS, request.getfixturevalue(name), processor, template, supervise=False)
    for index, form in enumerate(FORMS):
        sample = dataset[index]
        images = form["image"] if isinstance(form["image"], list) else [form["image"]]
        assert int((sample.input_ids == IMAGE_TOKEN_ID).sum()) == 16 * len(images)
        assert len(sample.images) == len(images)
        assert sample.images[0].load_pixels().shape == (3, 56, 56)
        assert not sample.mismatch
        assert not (sample.labels >= 0).any()
        sizes = dataset.measure(index)
        assert (sizes.num_tokens, sizes.num_images) == (len(sample.input_ids), len(images))
        assert (sizes.num_supervised, sizes.mismatch) == (0, False)


def test_an_image_alone_is_seen_as_in_a_conversation(toy, qwen, processor):
    """Causal attention: what an image token sees is what stands before it."""
    alone, asked = (
        _dataset(toy, [form], qwen, processor, "qwen_2", supervise=False)[0] for form in (FORMS[0], FORMS[4])
    )
    end = asked.images[0].start + 16
    assert alone.images[0].start == asked.images[0].start
    assert torch.equal(alone.input_ids[:end], asked.input_ids[:end])


def test_ids_of_records_with_answers_stay(toy, qwen, processor):
    """All toy records, in all templates that take them."""
    records = json.loads((toy / "data.json").read_text())
    with_labels = _dataset(toy, records, qwen, processor, "qwen_2")
    without = _dataset(toy, records, qwen, processor, "qwen_2", supervise=False)
    for index in range(len(records)):
        assert torch.equal(with_labels[index].input_ids, without[index].input_ids)
        assert (with_labels[index].labels >= 0).any()
        assert not (without[index].labels >= 0).any()
    assert with_labels.fingerprint != without.fingerprint


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_otherwise_an_answer_is_needed(toy, qwen, processor, form):
    with pytest.raises(RecordError):
        _dataset(toy, [form], qwen, processor, "qwen_2")[0]


def test_text_without_images_is_still_checked(toy, qwen, processor):
    dataset = _dataset(toy, [{"conversations": []}, {"image": []}], qwen, processor, "qwen_2", supervise=False)
    for index in range(2):
        with pytest.raises(RecordError):
            dataset[index]


def test_a_loader_gives_images_and_no_label(toy, qwen, processor):
    dataset = _dataset(toy, FORMS, qwen, processor, "qwen_2", supervise=False)
    loader = RossLoader(dataset, SampleOrder(len(FORMS)), global_batch_size=6, micro_batch_size=2,
                        bad_samples=BadSamplePolicy())  # fmt: skip
    batches = loader.next_step()
    assert sum(batch.num_supervised_tokens for batch in batches) == 0
    assert sum(float(batch.recon_weight.sum()) for batch in batches) == 7
    assert loader.bad_sample_counts == {}
    loader.close()


def test_a_survey_counts_samples_without_image(toy, qwen, processor, tmp_path):
    text = {"conversations": [QUESTION | {"value": "Well?"}, {"from": "gpt", "value": "No."}]}
    dataset = _dataset(toy, [*FORMS, text], qwen, processor, "qwen_2", supervise=False)
    survey = survey_dataset(
        dataset, decode=True, num_workers=1, progress_file=tmp_path / "p.jsonl", show_progress=False
    )
    assert survey.counts == {"no_image": 1}
    assert "lm_loss_weight=0" in survey.examples["no_image"][0]
    assert not survey.skipped


def test_the_limit_of_images_is_the_kernels_one():
    assert MAX_IMAGES_PER_SAMPLE == KEYS_OF_A_SAMPLE

"""engine/inference_jobs.py: seeds, classes and stored settings."""

from pathlib import Path

import pytest

from ddpm_model import DDPMModel
from engine import inference_jobs
from engine.errors import UserError
from engine.inference_jobs import InferenceJob


def test_parse_seeds_takes_numbers_and_ranges_without_repeats():
    assert inference_jobs.parse_seeds("7") == [7]
    assert inference_jobs.parse_seeds("1,5, 10-12") == [1, 5, 10, 11, 12]
    for text in ("", "3-", "-3", "1.5", "1,,2", "²"):
        with pytest.raises(UserError, match="must look like"):
            inference_jobs.parse_seeds(text)
    with pytest.raises(UserError, match="'3-5,4', but names a seed twice"):
        inference_jobs.parse_seeds("3-5,4")


def test_noise_levels_of_earlier_versions_need_no_spacing():
    stored = {"seeds": [3], "spacing": "karras"}
    for levels, spacing in (("80,3", None), (None, "karras")):
        complete = inference_jobs.complete_settings(stored | {"noise_levels": levels})
        assert complete["spacing"] == spacing


def test_class_without_training_images_may_be_asked_for():
    model = DDPMModel(8, dim=8, dim_mults=(1,), class_counts={"cat": 3, "dog": 0})
    job = InferenceJob(model, {"batch_size": 1, "classes": "dog"}, Path(), "ddim")
    assert job.labels_of(range(4)) == [1] * 4

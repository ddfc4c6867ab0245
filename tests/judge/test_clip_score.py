"""CLIPScore is 100 times the cosine of the image's and its own prompt's embedding, as CLIP itself gives them."""

from __future__ import annotations

import pytest
import torch
from support.clip import save_clip
from transformers import AutoTokenizer

from handful.judge.clip_score import ClipScore
from handful.judge.image_sets import Images


def test_each_image_is_scored_against_the_prompt_of_its_class(tmp_path):
    model = save_clip(tmp_path / "clip").eval()
    prompts = {"cat": "a photo of a cat", "dog": "a dog"}
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = ["cat", "dog", "dog", "cat", "cat", "dog"]
    score = ClipScore(str(tmp_path / "clip"), prompts)
    found = score(Images(images, labels))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
    with torch.no_grad():
        for image, label, value in zip(images, labels, found, strict=True):
            tokens = tokenizer(prompts[label], return_tensors="pt").input_ids
            out = model(input_ids=tokens, pixel_values=score.extractor.prepare(image[None]))
            cosine = float(out.logits_per_image) / float(model.logit_scale.exp())
            assert value == pytest.approx(max(0.0, 100 * cosine), rel=1e-5, abs=1e-4)

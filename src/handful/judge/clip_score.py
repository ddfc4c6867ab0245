"""CLIPScore (Hessel et al., EMNLP 2021): how near an image is to its prompt, 100 times the cosine in CLIP, not below 0.

torchmetrics' scale; the paper's own is 2.5 times the cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from handful.core.ranges import any_range
from handful.features.clip import clip_classifier
from handful.judge.image_sets import Images


class ClipScore:
    """Scores images against the prompt of their class.

    Args:
        name: `clip`, a directory or hub name of a CLIP of transformers.
        prompts: By class.

    Raises:
        RequestError: If the CLIP can't be loaded, or a prompt is too long for it.
    """

    def __init__(self, name: str, prompts: Mapping[str, str]) -> None:
        self.extractor = clip_classifier(name, prompts)
        self.texts: Any = self.extractor.network.texts
        self.places = {name: place for place, name in enumerate(prompts)}

    @torch.no_grad()
    @any_range()
    def __call__(self, images: Images) -> np.ndarray:
        """(n,), 0 to 100."""
        found = []
        for part in images.parts():
            seen = normalize(self.extractor(images.read(part)), dim=-1)
            texts = self.texts[[self.places[label] for label in images.labels[part]]]
            found.append((100 * (seen * texts).sum(1)).clamp(min=0))
        return torch.cat(found).double().cpu().numpy()

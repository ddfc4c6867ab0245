"""For every test: one thread, a feature cache of its own, never the user's, and tiny models and exemplars."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from handful.data.images import write_png
from handful.zoo.digits import load_digits_split

torch.set_num_threads(1)  # the models are tiny, and the machine may be shared
os.fsync = lambda _: (
    None
)  # what the disk keeps when the power fails no test can see, and a run waits for it a quarter of its time


def pytest_collection_finish() -> None:
    """Garbage collection looks no more at what is imported by now, and seldom at the rest: a fifteenth of the whole time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: else one process works on the last of them while the others have nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight real digits of each class, as files."""
    root = tmp_path_factory.mktemp("digits")
    split = load_digits_split()
    for label in range(10):
        (root / str(label)).mkdir()
        for place, image in enumerate(split.train_images[split.train_labels == label][:8]):
            write_png(root / str(label) / f"{place:02d}.png", image)
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Saves an untrained UNet2DModel of 8 x 8 gray images; `labels` 0 makes it unconditional, `broken` gives NaN."""

    def make(labels: int = 0, broken: bool = False) -> str:
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=labels or None,
        )
        if broken:
            torch.nn.init.constant_(network.conv_out.weight, float("nan"))
        network.save_pretrained(folder / "unet")
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(folder / "scheduler")
        return str(folder)

    return make

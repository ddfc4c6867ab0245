"""`fdd` and `fid`: their wrappers with the real classes, tiny and random, against the published steps by Pillow and numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from support.vision import random_images, save_vision_model
from torch import Tensor, nn

from handful.errors import RequestError
from handful.features import extractor_skeleton, load_extractor
from handful.judge.evaluate import evaluate

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZES = ((30, 22), (22, 30), (240, 300), (224, 224))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Eight real and eight generated photographs of one class, of several sizes and shapes."""
    root, random = tmp_path_factory.mktemp("presets"), np.random.default_rng(0)
    for name, shift in (("real", 0), ("made", 25)):
        (root / name / "cat").mkdir(parents=True)
        for number in range(8):
            width, height = SIZES[number % 4]
            coarse = Image.fromarray(random.integers(0, 230, (5, 6, 3), np.uint8) + np.uint8(shift))
            coarse.resize((width, height), Image.Resampling.NEAREST).save(root / name / "cat" / f"{number}.png")
    return root


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """By the formula, with scipy's square root of a matrix."""
    one, two = (np.cov(of, rowvar=False) for of in (x, y))
    root = scipy.linalg.sqrtm(one @ two).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root))


def bicubic(before: int, after: int, step: float) -> np.ndarray:
    """(after, before): cubic convolution with a = -0.75 at every `step`, the border repeated (Keys 1981; torch's own)."""
    matrix = np.zeros((after, before))
    for row in range(after):
        at = (row + 0.5) * step - 0.5
        for place in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x, a = abs(at - place), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(place, 0), before - 1)] += near
    return matrix


@pytest.mark.filterwarnings("ignore")
def test_fdd_is_dgm_evals_resizing_normalising_and_distance(sets, tmp_path):
    model = save_vision_model(tmp_path, "Dinov2Model", image_size=70)
    # facebookresearch/dinov2's positions: 5 x 5 of them, read at 16 x 16 places, a step of 5 / 16.1 apart
    with torch.no_grad():
        held = model.embeddings.position_embeddings
        grid = held[0, 1:].reshape(5, 5, -1).double().numpy()
        taps = bicubic(5, 16, 5 / 16.1)
        placed = np.einsum("ia,jb,abd->ijd", taps, taps, grid).reshape(1, 256, -1)
        model.embeddings.position_embeddings = nn.Parameter(torch.cat([held[:, :1], torch.tensor(placed).float()], 1))

    def features(folder: Path) -> np.ndarray:
        rows = []
        for file in sorted(folder.rglob("*.png")):
            image = np.asarray(Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)) / 255
            pixels = torch.tensor((image - MEAN) / STD).permute(2, 0, 1)[None].float()
            with torch.no_grad():
                rows.append(model(pixel_values=pixels).pooler_output[0].double().numpy())
        return np.array(rows)

    wanted = frechet(features(sets / "real"), features(sets / "made"))
    found = evaluate(sets / "made", sets / "real", f"fdd:{tmp_path}", audit=False, ceiling=False, cache=tmp_path / "cache")
    assert found.judge == f"fdd:{tmp_path}"
    assert found.summary.pooled.generated.values["frechet"] == pytest.approx(wanted, rel=1e-4)
    assert any("224 x 224 without cropping and rounded to 8 bits, as dgm-eval does" in note for note in found.notes)
    again = evaluate(sets / "made", sets / "real", f"fdd:{tmp_path}", audit=False, ceiling=False, cache=tmp_path / "cache")
    assert again.summary.pooled.generated.values == found.summary.pooled.generated.values
    other = evaluate(sets / "made", sets / "real", str(tmp_path), audit=False, ceiling=False, cache=tmp_path / "cache")
    assert other.summary.pooled.generated.values["frechet"] != found.summary.pooled.generated.values["frechet"]


class Detector(nn.Module):
    """Called as NVIDIA's Inception: 0 to 255 at any size, features where they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3, 2)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(img, [9, 9], mode="bilinear") / 128 - 1
        features = self.layer(x).relu().mean([2, 3])
        return features if return_features else features.softmax(1)


@pytest.mark.filterwarnings("ignore")
def test_fid_is_torchmetrics_fid_with_the_same_detector(tmp_path, monkeypatch):
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.manual_seed(0)
    detector = Detector().eval()
    torch.jit.script(detector).save(str(tmp_path / "inception-2015-12-05.pt"))

    class Asked(nn.Module):  # torchmetrics' contract of a network of one's own: bytes in, features out
        num_features = 5

        def forward(self, images: Tensor) -> Tensor:
            return detector(images.float(), return_features=True)

    metric = FrechetInceptionDistance(feature=Asked(), input_img_size=(3, 16, 16)).set_dtype(torch.float64)
    for name, low in (("real", 0), ("made", 60)):
        (tmp_path / name / "cat").mkdir(parents=True)
        batch = torch.randint(low, 256, (12, 3, 16, 16), dtype=torch.uint8)
        metric.update(batch, real=name == "real")
        for number, image in enumerate(batch):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / "cat" / f"{number}.png")
    wanted = float(metric.compute())
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "cache"))
    found = evaluate(tmp_path / "made", tmp_path / "real", f"fid:{tmp_path}/inception-2015-12-05.pt", audit=False)
    assert found.summary.pooled.generated.values["frechet"] == pytest.approx(wanted, rel=1e-4)
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "inception-2015-12-05.pt").rename(tmp_path / "cache" / "weights" / "inception-2015-12-05.pt")
    assert load_extractor("fid").digest == found.judge_digest


def test_what_is_missing_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in ("real", "made"):
        for number in range(7):
            file = tmp_path / folder / "cat" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 9 * number + len(folder), np.uint8)).save(file)
    with pytest.raises(RequestError, match=r"judge: 'fid': its weights are missing .*https://.*inception-2015-12-05.pt to '"):
        evaluate(tmp_path / "made", tmp_path / "real", "fid")
    with pytest.raises(RequestError, match=r"judge: 'facebook/dinov2-large'.*hf download facebook/dinov2-large"):
        evaluate(tmp_path / "made", tmp_path / "real", "fdd")
    with pytest.raises(RequestError, match=r"fid:/no/such.pt': its weights are missing"):
        load_extractor("fid:/no/such.pt")
    torch.jit.script(nn.Conv2d(3, 2, 3)).save(str(tmp_path / "other.pt"))
    with pytest.raises(RequestError, match=r"not NVIDIA's Inception"):
        load_extractor(f"fid:{tmp_path}/other.pt")
    save_vision_model(tmp_path / "vit", "ViTModel", image_size=224)
    with pytest.raises(RequestError, match=r"this is not a DINOv2"):
        load_extractor(f"fdd:{tmp_path}/vit")
    with pytest.raises(RequestError, match=r"fdd@112': only transformers models"):
        load_extractor("fdd@112")


def test_the_published_network_is_counted_without_weights_and_takes_a_gradient():
    counted = extractor_skeleton("fdd")
    assert sum(one.numel() for one in counted.parameters()) == 304_368_640 - (1369 - 256) * 1024
    assert counted(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 1024)


def test_a_tensor_of_another_size_is_resized_in_torch_and_takes_a_gradient(tmp_path):
    save_vision_model(tmp_path, "Dinov2Model", image_size=70)
    batch = random_images(1, 3, 40, 30).float().requires_grad_()
    (gradient,) = torch.autograd.grad(load_extractor(f"fdd:{tmp_path}")(batch).square().sum(), batch)
    assert float(gradient.abs().sum()) > 0

"""TorchScript files as extractors: both conventions, with real scripted modules; what is no such file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.vision import random_images
from torch import Tensor, nn

from handful.errors import RequestError
from handful.features.registry import extractor_skeleton, load_extractor


class Detector(nn.Module):
    """Called as NVIDIA's Inception: 0 to 255 at any size, features where they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False) -> Tensor:
        pooled = nn.functional.interpolate(img, [6, 6], mode="bilinear").mean([2, 3])
        return pooled if return_features else self.layer(pooled).softmax(1)


class Scale(nn.Module):
    """What it answers depends on a number that is no weight."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by
        self.layer = nn.Conv2d(3, 2, 3, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean([2, 3]) * self.by


class Two(nn.Module):
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return images + others


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def scripted(path: Path, network: nn.Module) -> str:
    torch.jit.script(network.eval()).save(str(path))
    return str(path)


def test_a_detector_is_fed_0_to_255_and_asked_for_its_features(tmp_path):
    extractor = load_extractor(scripted(tmp_path / "inception.pt", Detector()))
    levels = torch.randint(0, 256, (3, 3, 9, 7)).float()
    wanted = Detector()(levels, return_features=True)
    torch.testing.assert_close(extractor(levels / 127.5 - 1), wanted, rtol=1e-5, atol=1e-3)
    assert extractor(levels[:1, :1] / 127.5 - 1).shape == (1, 3)
    assert not extractor.is_classifier


def test_another_network_is_fed_the_images_as_they_are(tmp_path):
    batch = random_images(2, 3, 7, 9).float()
    extractor = load_extractor(scripted(tmp_path / "net.ts", Scale(2.0)))
    with torch.no_grad():
        torch.testing.assert_close(extractor(batch), Scale(2.0)(batch))
    assert torch.equal(extractor(batch.half()), extractor(batch.half().float()))


@pytest.mark.parametrize("network", [Detector(), Scale(2.0)])
def test_gradients_are_finite_differences(tmp_path, network):
    extractor = load_extractor(scripted(tmp_path / "net.pt", network.double()))
    assert torch.autograd.gradcheck(extractor, (random_images(1, 3, 7, 5).requires_grad_(),), atol=1e-5)
    assert not any(one.requires_grad for one in extractor.parameters())


def test_traced_and_frozen_files_are_taken(tmp_path):
    batch = random_images(2, 3, 8, 8).float()
    torch.jit.trace(Scale(2.0).eval(), batch).save(str(tmp_path / "traced.pt"))
    torch.jit.freeze(torch.jit.script(Scale(2.0).eval())).save(str(tmp_path / "frozen.pt"))
    for name in ("traced.pt", "frozen.pt"):
        torch.testing.assert_close(load_extractor(str(tmp_path / name))(batch), Scale(2.0)(batch).detach())


def test_the_program_counts_into_the_digest(tmp_path):
    names = [scripted(tmp_path / "a.pt", Scale(2.0)), scripted(tmp_path / "b.pt", Scale(3.0))]
    digests = [load_extractor(name).digest for name in (*names, names[0])]
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]


def test_a_skeleton_is_on_the_meta_device(tmp_path):
    for network in (Detector(), Scale(2.0)):
        skeleton = extractor_skeleton(scripted(tmp_path / "net.pt", network))
        assert {one.device.type for one in skeleton.parameters()} == {"meta"}
        batch = torch.zeros(2, 3, 8, 8, device="meta", requires_grad=True)
        features = skeleton(batch)
        assert features.device.type == "meta"
        features.sum().backward()


@pytest.mark.parametrize("kind", ["state dict", "pickled module", "garbage", "zip"])
def test_what_is_no_torchscript_is_refused_by_name(tmp_path, kind):
    import zipfile

    file = tmp_path / "net.pt"
    if kind == "garbage":
        file.write_bytes(b"garbage")
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "a")
    else:
        torch.save(Scale(2.0).state_dict() if kind == "state dict" else Scale(2.0), file)
    with pytest.raises(RequestError, match=r"^features: .*net\.pt': it is no TorchScript file.*torch\.jit\.script"):
        load_extractor(str(file))


def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Evil(), tmp_path / "net.pt")
    with pytest.raises(RequestError, match=r"^features: .*no TorchScript file"):
        load_extractor(str(tmp_path / "net.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match=r"^features: .*none\.pt': there is no such file"):
        load_extractor(str(tmp_path / "none.pt"))


@pytest.mark.parametrize("network", [Two(), Pair()])
def test_a_forward_that_does_not_fit_is_refused_with_its_signature(tmp_path, network):
    with pytest.raises(RequestError, match=r"^features: .*return one tensor \(forward\("):
        load_extractor(scripted(tmp_path / "net.pt", network))

"""LoRAs, words of textual inversion, other autoencoders and schedulers: loaded by diffusers, part of the model's identity."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from support.pipelines import TRAINED, tiny_sdxl, tiny_stable_diffusion, tiny_vae

from handful.errors import RequestError
from handful.models import load, skeleton
from handful.runs.provenance import model_digest


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd/, sdxl/, lora.safetensors (of sd's UNet), word.safetensors, vae/, scheduler/."""
    root = tmp_path_factory.mktemp("adapters")
    pipeline: Any = tiny_stable_diffusion(root / "sd")
    tiny_sdxl(root / "sdxl")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    torch.manual_seed(0)
    StableDiffusionPipeline.save_lora_weights(root, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    (root / "pytorch_lora_weights.safetensors").rename(root / "lora.safetensors")
    save_file({"emb_params": torch.full((2, 16), 3.0)}, root / "word.safetensors")
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, root / "other.safetensors")
    torch.manual_seed(7)
    tiny_vae().save_pretrained(root / "vae")
    tiny_vae(channels=8).save_pretrained(root / "wide")
    DDIMScheduler(**{**TRAINED, "prediction_type": "v_prediction"}).save_pretrained(root / "scheduler")
    return root


def answer(denoiser: Any, prompt: str = "a cat") -> torch.Tensor:
    x = torch.randn(1, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, denoiser.levels.spacing(4)[1], denoiser.condition([prompt]))


def test_a_lora_changes_answers_as_diffusers_does_and_the_digest(disk: Path):
    plain, whole = load(disk / "sd"), load(disk / "sd", lora=[(disk / "lora.safetensors", 1.0)])
    half = load(disk / "sd", lora=[(disk / "lora.safetensors", 0.5)])
    theirs: Any = StableDiffusionPipeline.from_pretrained(disk / "sd", safety_checker=None)
    theirs.load_lora_weights(disk, weight_name="lora.safetensors")
    plain_theirs = plain.network
    plain.network = theirs.unet.eval()
    torch.testing.assert_close(answer(plain), answer(whole), rtol=1e-4, atol=1e-4)
    plain.network = plain_theirs
    assert not torch.allclose(answer(plain), answer(whole), atol=1e-3)
    assert not torch.allclose(answer(half), answer(whole), atol=1e-3)
    assert len({model_digest(each) for each in (plain, whole, half)}) == 3


def test_a_word_of_textual_inversion_is_told_and_part_of_the_digest(disk: Path):
    plain, taught = load(disk / "sd"), load(disk / "sd", embeddings={"<cat>": str(disk / "word.safetensors")})
    torch.testing.assert_close(answer(plain), answer(taught))
    assert not torch.allclose(answer(plain, "a <cat>"), answer(taught, "a <cat>"), atol=1e-4)
    assert model_digest(plain) != model_digest(taught)


def test_another_autoencoder_and_another_schedulers_levels(disk: Path):
    plain, other = load(disk / "sd"), load(disk / "sd", vae=disk / "vae", scheduler=disk / "scheduler")
    assert (plain.prediction, other.prediction) == ("eps", "v")
    assert skeleton(disk / "sd", scheduler=disk / "scheduler").prediction == "v"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(plain.decode(latents), other.decode(latents), atol=1e-3)
    assert model_digest(plain) != model_digest(other)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such LoRA": ({"lora": [("nowhere.safetensors", 1.0)]}, r"model\.lora: .*no such file"),
    "no LoRA of this model": (
        {"lora": [("other.safetensors", 1.0)]},
        r"model\.lora: .*(nothing in it|none of its weights fit)",
    ),
    "a pickle": ({"embeddings": {"<a>": "word.bin"}}, r"model\.embeddings: .*no \.safetensors"),
    "no embedding of this model": ({"embeddings": {"<a>": "lora.safetensors"}}, r"model\.embeddings: .*does not fit"),
    "no vae": ({"vae": "nowhere"}, r"model\.vae: .*config\.json"),
    "another vae's latents": ({"vae": "wide"}, "latents have 8"),
    "no scheduler": ({"scheduler": "vae"}, r"model\.scheduler: .*scheduler_config\.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_its_name(disk: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(disk)
    words, said = REFUSED[case]
    with pytest.raises(RequestError, match=said):
        load("sd", **words)


def test_models_without_such_parts_refuse_them(disk: Path):
    for words in ({"lora": [("x", 1.0)]}, {"embeddings": {"a": "b"}}):
        with pytest.raises(RequestError, match=r"^model\.(lora|embeddings): .*does not use it"):
            load("digits", **words)
    with pytest.raises(RequestError, match=r"^model\.lora: .*(none of its weights fit|nothing in it)"):
        load(disk / "sdxl", lora=[(disk / "other.safetensors", 1.0)])

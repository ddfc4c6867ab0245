"""What Chamfer guidance costs in families of today, at their published sizes, counted as `handful cost` does.

    python benchmarks/new_families.py

Networks and autoencoders have the sizes of the published configs, on the meta device; the text encoder, which runs once for a
prompt, is one layer of the right width with a tokenizer of a few words, so that nothing is downloaded. 1024 x 1024,
the default of Chamfer guidance by DINOv2, against classifier-free guidance and plain sampling by the same sampler.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.pipelines_flow import t5_tokenizer

from handful import from_pipeline
from handful.cost.estimate import cost_of
from handful.recipe.schema import recipe_from

DPM = diffusers.DPMSolverMultistepScheduler


def _meta(cls: Any, **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config).eval()


def _vae(latents: int, **config: Any) -> Any:
    blocks: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return _meta(diffusers.AutoencoderKL, latent_channels=latents, **blocks, **config)


def _gemma() -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 2304, "intermediate_size": 64, "num_hidden_layers": 1}
    return transformers.Gemma2Model(transformers.Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def pixart_sigma() -> Any:
    """PixArt-Sigma-XL-2-1024-MS: 611 million parameters."""
    network = _meta(
        diffusers.PixArtTransformer2DModel,
        sample_size=128,
        num_layers=28,
        caption_channels=4096,
        cross_attention_dim=1152,
        norm_type="ada_norm_single",
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=40, d_model=4096, d_kv=8, d_ff=8, num_layers=1))
    parts = {"transformer": network, "vae": _vae(4, scaling_factor=0.13025), "scheduler": DPM()}
    return from_pipeline(diffusers.PixArtSigmaPipeline(**parts, text_encoder=encoder.eval(), tokenizer=t5_tokenizer()))


def sana() -> Any:
    """Sana_1600M_1024px."""
    blocks: dict[str, Any] = {
        f"{side}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for side in ("encoder", "decoder")
    }
    layers = {"encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3, 3, 3, 3, 3, 3)}
    vae = _meta(diffusers.AutoencoderDC, scaling_factor=0.41407, **layers, **blocks)
    scheduler = DPM(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"transformer": _meta(diffusers.SanaTransformer2DModel), "vae": vae, "scheduler": scheduler}
    return from_pipeline(diffusers.SanaPipeline(**parts, text_encoder=_gemma(), tokenizer=t5_tokenizer()))


def auraflow() -> Any:
    """AuraFlow 0.3: 6.8 billion parameters."""
    network = _meta(diffusers.AuraFlowTransformer2DModel, sample_size=128, pos_embed_max_size=9216)
    config = transformers.UMT5Config(vocab_size=40, d_model=2048, d_kv=8, d_ff=8, num_layers=1)
    parts = {"transformer": network, "vae": _vae(4, scaling_factor=0.13025)}
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    encoder = transformers.UMT5EncoderModel(config).eval()
    return from_pipeline(diffusers.AuraFlowPipeline(**parts, text_encoder=encoder, tokenizer=t5_tokenizer()))


def main() -> None:
    """Prints a row for each family."""
    print("| family | parameters | steps | plain, TFLOP an image | Chamfer over CFG | Chamfer over plain |")
    print("|---|---|---|---|---|---|")
    for family, steps in itertools.product((pixart_sigma, sana, auraflow), (20, 40)):
        words: dict[str, Any] = {"model": {"name": f"{Path(__file__).resolve()}:{family.__name__}"}, "classes": ["cat"]}
        words |= {"exemplars": {"path": "photos", "k": 8}, "per_class": 16, "cohort": 16, "sampler": {"steps": steps}}
        cost = cost_of(recipe_from({**words, "guidance": [{"method": "chamfer", "features": "dinov2"}]}))
        parameters = cost.networks["network"] / 1e9
        plain = cost.plain.flops_per_image / 1e12
        ratios = f"{cost.ratio_to_cfg:.3f} | {cost.ratio_to_plain:.3f}"
        print(f"| {family.__name__} | {parameters:.2f} G | {steps} | {plain:.0f} | {ratios} |")


if __name__ == "__main__":
    main()

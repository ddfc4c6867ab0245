"""Tiny pipelines of families that have no file of their own: diffusers' own classes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from support.pipelines import made, tiny_vae
from support.pipelines_flow import t5_encoder, t5_tokenizer

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
LANGUAGE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def _made(kind: str, **parts: Any) -> Any:
    return made(getattr(diffusers, kind)(**parts))


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def tiny_pixart() -> Any:
    config = {"sample_size": 32, "cross_attention_dim": 32, "caption_channels": 32, "norm_type": "ada_norm_single"}
    network = diffusers.PixArtTransformer2DModel(**HEADS, **config)
    network.proj_out.weight.data.normal_(std=0.3)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = {"transformer": network, "scheduler": scheduler, "vae": tiny_vae(scaling_factor=0.13025)}
    return _made("PixArtSigmaPipeline", **parts, text_encoder=t5_encoder(), tokenizer=t5_tokenizer())


def tiny_sana() -> Any:
    config = {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
    network = diffusers.SanaTransformer2DModel(**HEADS, **config, cross_attention_dim=32, caption_channels=32, sample_size=32)
    words: dict[str, Any] = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    words |= {f"{side}_qkv_multiscales": ((), ()) for side in ("encoder", "decoder")}
    words |= {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    words |= {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
    vae = diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **words)
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    encoder = transformers.Gemma2Model(transformers.Gemma2Config(**LANGUAGE))
    return _made(
        "SanaPipeline", transformer=network, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=t5_tokenizer()
    )


def tiny_auraflow() -> Any:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    config = transformers.UMT5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder = transformers.UMT5EncoderModel(config)
    parts = {"transformer": network, "scheduler": _flow(shift=1.73), "vae": tiny_vae(scaling_factor=0.13025)}
    return _made("AuraFlowPipeline", **parts, text_encoder=encoder, tokenizer=t5_tokenizer())


def tiny_lumina2() -> Any:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        cap_feat_dim=32,
    )
    encoder = transformers.Gemma2Model(transformers.Gemma2Config(**LANGUAGE))
    parts = {"transformer": network, "scheduler": _flow(shift=6.0), "vae": tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)}
    return _made("Lumina2Pipeline", **parts, text_encoder=encoder, tokenizer=t5_tokenizer())


def tiny_cogview4() -> Any:
    network = diffusers.CogView4Transformer2DModel(
        **HEADS, in_channels=4, out_channels=4, text_embed_dim=32, time_embed_dim=16, condition_dim=8, rope_axes_dim=(16, 16)
    )
    encoder = transformers.GlmModel(transformers.GlmConfig(**LANGUAGE, pad_token_id=0))
    scheduler = _flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    parts = {"transformer": network, "scheduler": scheduler, "vae": tiny_vae(scaling_factor=1.0)}
    return _made("CogView4Pipeline", **parts, text_encoder=encoder, tokenizer=t5_tokenizer())


def tiny_chroma() -> Any:
    network = diffusers.ChromaTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    parts = {"transformer": network, "scheduler": _flow(), "vae": tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)}
    return _made("ChromaPipeline", **parts, text_encoder=t5_encoder(), tokenizer=t5_tokenizer())


def tiny_qwen() -> Any:
    network = diffusers.QwenImageTransformer2DModel(
        **HEADS, in_channels=16, out_channels=4, joint_attention_dim=32, axes_dims_rope=(4, 4, 8)
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.5, 1.0, 3.0],
    )
    language = {name: value for name, value in LANGUAGE.items() if name != "head_dim"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    rope = {"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(text_config={**language, "rope_scaling": rope}, vision_config=vision)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    parts = {"transformer": network, "scheduler": _flow(use_dynamic_shifting=True, shift_terminal=0.02), "vae": vae}
    return _made("QwenImagePipeline", **parts, text_encoder=encoder, tokenizer=t5_tokenizer())


MORE: dict[str, Callable[[], Any]] = {
    "pixart": tiny_pixart,
    "sana": tiny_sana,
    "auraflow": tiny_auraflow,
    "lumina2": tiny_lumina2,
    "cogview4": tiny_cogview4,
    "chroma": tiny_chroma,
    "qwen": tiny_qwen,
}


def tiny(name: str) -> Any:
    """One of `MORE`, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MORE[name]()

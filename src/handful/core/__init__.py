"""The one primitive: levels of noise, the denoiser, the samplers."""

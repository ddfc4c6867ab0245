"""handful's guidance inside diffusers' own tiny pipelines: the same latents as our samplers give with the same terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks
from support.pipelines import TRAINED, tiny_sdxl, tiny_stable_diffusion
from support.pipelines_flow import tiny_flux, tiny_sd3
from torch import Tensor

from handful.core.denoiser import NetworkDenoiser, output_from
from handful.core.noise import VP, Flow, Level
from handful.core.samplers import ddim
from handful.errors import RequestError
from handful.features.registry import pixels
from handful.guidance import CFG, Chamfer, Guidance, Guided, Pull, Timing
from handful.guidance.guiders import Guider
from handful.integrations.diffusers import GuidanceCallback, HandfulGuider, level_of_time
from handful.models import from_pipeline
from handful.models.flux import packed

PIPELINES: dict[str, Callable[[], Any]] = {
    "StableDiffusion": tiny_stable_diffusion,
    "StableDiffusionV": lambda: tiny_stable_diffusion(prediction="v_prediction"),
    "StableDiffusionXL": tiny_sdxl,
    "StableDiffusion3": tiny_sd3,
    "Flux": tiny_flux,
}
SIDE, N, PROMPT = 64, 2, "a cat"


def chamfer(scale: float = 0.5, jacobian: Any = "gaussian", timing: Timing | None = None, **pull: Any) -> Chamfer:
    exemplars = torch.randn(3, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(5))
    return Chamfer(pixels(), exemplars, scale, timing=timing, pull=Pull(jacobian=jacobian, **pull))


def noise(n: int = N) -> Tensor:
    return torch.randn(n, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(1))


def as_given(latents: Tensor, pipeline: Any) -> Tensor:
    return packed(latents) if type(pipeline).__name__ == "FluxPipeline" else latents


def denoiser_of(pipeline: Any) -> NetworkDenoiser:
    return from_pipeline(pipeline, resolution=(SIDE, SIDE))


def drawn(pipeline: Any, steps: int = 4, guidance_scale: float | None = None, prompt: Any = PROMPT, **more: Any) -> Tensor:
    """The pipeline's own latents; Flux's scale is not classifier-free guidance's, and stays as it is."""
    told = {} if type(pipeline).__name__ == "FluxPipeline" else {"guidance_scale": guidance_scale or 1.0}
    told |= {"latents": as_given(noise(), pipeline), "num_images_per_prompt": N if isinstance(prompt, str) else 1}
    return pipeline(prompt, height=SIDE, width=SIDE, num_inference_steps=steps, output_type="latent", **{**told, **more}).images


def ours(denoiser: NetworkDenoiser, terms: list[Guidance], steps: int = 4, prompts: list[str] | None = None) -> Tensor:
    levels, condition = denoiser.levels.spacing(steps, "model"), denoiser.condition(prompts or [PROMPT] * N)
    return ddim(Guided(denoiser, terms), noise(), levels, condition)


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative to the whole."""
    return float((found - wanted).norm() / wanted.norm())


def calls_of(network: torch.nn.Module) -> list[int]:
    """Counts a network's calls from now on, in the list's only number."""
    count = [0]
    network.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


class TestCallback:
    @pytest.mark.parametrize(("jacobian", "steps"), [("gaussian", 16), ("exact", 4)])
    @pytest.mark.parametrize("kind", PIPELINES)
    def test_a_pipeline_with_it_is_our_sampler_with_the_same_terms(self, kind, jacobian, steps):
        pipeline = PIPELINES[kind]()
        denoiser, terms = denoiser_of(pipeline), [chamfer(jacobian=jacobian)]
        given = as_given(noise(), pipeline)
        callback = GuidanceCallback(pipeline, terms, PROMPT, latents=given, denoiser=denoiser)
        found = drawn(pipeline, steps, callback_on_step_end=callback)
        assert off(found, as_given(ours(denoiser, terms, steps), pipeline)) < 1e-4
        assert off(found, drawn(pipeline, steps)) > 0.02, "the guidance must matter"

    @pytest.mark.parametrize("kind", ["StableDiffusion", "StableDiffusionXL", "StableDiffusion3"])
    def test_beside_the_pipelines_own_cfg_the_shifts_add_up(self, kind):
        pipeline = PIPELINES[kind]()
        denoiser, terms = denoiser_of(pipeline), [chamfer()]
        callback = GuidanceCallback(pipeline, terms, PROMPT, latents=noise(), denoiser=denoiser)
        found = drawn(pipeline, guidance_scale=3.0, callback_on_step_end=callback)
        assert off(found, ours(denoiser, [CFG(2.0), *terms])) < 1e-4

    def test_our_cfg_in_it_is_the_pipelines_own(self):
        pipeline = tiny_stable_diffusion()
        found = drawn(pipeline, callback_on_step_end=GuidanceCallback(pipeline, [CFG(2.0)], PROMPT, latents=noise()))
        assert off(found, drawn(pipeline, guidance_scale=3.0)) < 1e-4

    @pytest.mark.parametrize("kind", PIPELINES)
    def test_at_scale_zero_the_pipeline_is_as_without_it_to_the_bit_and_at_its_price(self, kind):
        pipeline = PIPELINES[kind]()
        denoiser = denoiser_of(pipeline)
        wanted, calls = drawn(pipeline), calls_of(denoiser.network)
        given = as_given(noise(), pipeline)
        callback = GuidanceCallback(pipeline, [chamfer(0.0)], PROMPT, latents=given, denoiser=denoiser)
        assert torch.equal(drawn(pipeline, callback_on_step_end=callback), wanted)
        assert calls == [4]

    def test_a_guided_step_costs_one_more_forward(self):
        pipeline = tiny_stable_diffusion()
        calls = calls_of(pipeline.unet)
        callback = GuidanceCallback(pipeline, [chamfer(timing=Timing(every=3))], PROMPT, latents=noise())
        drawn(pipeline, 6, callback_on_step_end=callback)
        assert calls == [6 + 2]

    def test_without_the_latents_only_the_first_step_is_unguided(self):
        pipeline = tiny_sdxl()
        denoiser, late = denoiser_of(pipeline), Timing(interval=(0.1, 1.0))
        apg = AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=0.9)
        callback = GuidanceCallback(pipeline, [chamfer(), Guider(apg)], PROMPT, denoiser=denoiser)
        wanted = ours(denoiser, [chamfer(timing=late), Guider(apg, timing=late)])
        for _ in range(2):  # and it can be used again
            assert off(drawn(pipeline, callback_on_step_end=callback), wanted) < 1e-4

    def test_held_directions_go_on_between_guided_steps(self):
        pipeline = tiny_stable_diffusion()
        denoiser, terms = denoiser_of(pipeline), [chamfer(timing=Timing(every=2), hold=True)]
        callback = GuidanceCallback(pipeline, terms, PROMPT, latents=noise(), denoiser=denoiser)
        found = drawn(pipeline, 6, callback_on_step_end=callback)
        assert off(found, ours(denoiser, terms, 6)) < 1e-4
        assert off(found, ours(denoiser, [chamfer(timing=Timing(every=2))], 6)) > 1e-3

    def test_each_image_keeps_its_prompt_and_chunks_change_nothing(self):
        pipeline, prompts = tiny_stable_diffusion(), ["a cat", "a dog"]
        denoiser, terms = denoiser_of(pipeline), [chamfer(jacobian="exact")]
        callback = GuidanceCallback(pipeline, terms, prompts, latents=noise(), denoiser=denoiser, chunk=1)
        found = drawn(pipeline, prompt=prompts, callback_on_step_end=callback)
        assert off(found, ours(denoiser, terms, prompts=prompts)) < 1e-4

    def test_a_half_precision_pipeline_keeps_its_precision(self):
        pipeline = tiny_stable_diffusion().to(torch.bfloat16)
        given = noise().to(torch.bfloat16)
        callback = GuidanceCallback(pipeline, [chamfer()], PROMPT, latents=given)
        found = drawn(pipeline, latents=given, callback_on_step_end=callback)
        assert found.dtype == torch.bfloat16
        assert 0.02 < off(found.float(), drawn(pipeline, latents=given).float()) < 1

    @pytest.mark.parametrize(
        "kind",
        [
            "PNDMScheduler",
            "DPMSolverMultistepScheduler",
            "EulerAncestralDiscreteScheduler",
            "DDPMScheduler",
            "HeunDiscreteScheduler",
            "UniPCMultistepScheduler",
            "LCMScheduler",
        ],
    )
    def test_multistep_and_stochastic_schedulers_are_refused_by_name(self, kind):
        pipeline = tiny_stable_diffusion()
        pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
        with pytest.raises(RequestError, match=f"pipeline.scheduler: '{kind}'.*DDIMScheduler"):
            GuidanceCallback(pipeline, [chamfer()], PROMPT)

    @pytest.mark.parametrize(
        ("kind", "field"),
        [("StableDiffusion", "clip_sample"), ("StableDiffusion", "thresholding"), ("StableDiffusion3", "stochastic_sampling")],
    )
    def test_schedulers_that_clip_or_draw_noise_are_refused(self, kind, field):
        pipeline = PIPELINES[kind]()
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **{field: True})
        with pytest.raises(RequestError, match=rf"pipeline.scheduler.{field}: True"):
            GuidanceCallback(pipeline, [chamfer()], PROMPT)

    def test_what_does_not_fit_the_pipelines_call_is_refused(self):
        pipeline = tiny_stable_diffusion()
        denoiser = denoiser_of(pipeline)
        once = GuidanceCallback(pipeline, [chamfer()], PROMPT, latents=noise(), denoiser=denoiser)
        drawn(pipeline, callback_on_step_end=once)
        with pytest.raises(RequestError, match="used in the last call"):
            drawn(pipeline, callback_on_step_end=once)
        few = GuidanceCallback(pipeline, [chamfer()], ["a", "b", "c"], latents=noise(), denoiser=denoiser)
        with pytest.raises(RequestError, match=r"prompt: .*the pipeline makes 2 images"):
            drawn(pipeline, callback_on_step_end=few)
        other = GuidanceCallback(pipeline, [chamfer()], PROMPT, latents=noise(1), denoiser=denoiser)
        with pytest.raises(RequestError, match="the same latents"):
            drawn(pipeline, callback_on_step_end=other)
        large = from_pipeline(pipeline, resolution=(2 * SIDE, SIDE))
        with pytest.raises(RequestError, match=r"resolution=\(height, width\)"):
            drawn(
                pipeline, callback_on_step_end=GuidanceCallback(pipeline, [chamfer()], PROMPT, latents=noise(), denoiser=large)
            )


def modular(pipeline: Any, guider: Any, scheduler: Any = None) -> Any:
    """The modular pipeline of the same components."""
    blocks = {"StableDiffusionXLPipeline": StableDiffusionXLAutoBlocks, "StableDiffusion3Pipeline": StableDiffusion3AutoBlocks}
    made = blocks[type(pipeline).__name__]().init_pipeline()
    parts = {name: part for name, part in pipeline.components.items() if part is not None and name in made._component_specs}
    made.update_components(**{**parts, "guider": guider, "scheduler": scheduler or pipeline.scheduler})
    made.set_progress_bar_config(disable=True)
    return made


def run(pipeline: Any, steps: int = 4) -> Tensor:
    """Its latents. Stable Diffusion 3's blocks make a null prediction only where a negative prompt is given."""
    told = {"negative_prompt": ""} if "3" in type(pipeline).__name__ else {}
    return pipeline(
        **told,
        prompt=PROMPT,
        num_images_per_prompt=N,
        latents=noise(),
        num_inference_steps=steps,
        height=SIDE,
        width=SIDE,
        output="latents",
    )


MODULAR = ["StableDiffusionXL", "StableDiffusion3"]


class TestGuider:
    @pytest.mark.parametrize(("jacobian", "steps"), [("gaussian", 16), ("identity", 4), ("exact", 4)])
    @pytest.mark.parametrize("kind", MODULAR)
    def test_a_modular_pipeline_with_it_is_our_sampler_with_the_same_terms(self, kind, jacobian, steps):
        pipeline = PIPELINES[kind]()
        denoiser, terms = denoiser_of(pipeline), [chamfer(jacobian=jacobian)]
        guider = HandfulGuider(denoiser, terms, ClassifierFreeGuidance(guidance_scale=3.0))
        assert off(run(modular(pipeline, guider), steps), ours(denoiser, [CFG(2.0), *terms], steps)) < 1e-4

    @pytest.mark.parametrize("kind", MODULAR)
    def test_without_a_base_it_is_the_conditional_model_shifted(self, kind):
        pipeline = PIPELINES[kind]()
        denoiser = denoiser_of(pipeline)
        calls = calls_of(denoiser.network)
        found = run(modular(pipeline, HandfulGuider(denoiser, [chamfer()])))
        assert calls == [4], "neither a null prediction nor a second forward"
        assert len(denoiser.network._forward_pre_hooks) == 1, "only the counter's hook may be left"
        assert off(found, ours(denoiser, [chamfer()])) < 1e-4

    def test_only_an_exact_jacobian_costs_another_forward_and_only_on_guided_steps(self):
        pipeline = tiny_sdxl()
        denoiser, base = denoiser_of(pipeline), ClassifierFreeGuidance(guidance_scale=3.0)
        calls = calls_of(pipeline.unet)
        run(modular(pipeline, HandfulGuider(denoiser, [chamfer()], base)))
        assert calls == [4 * 2]
        calls[0] = 0
        run(modular(pipeline, HandfulGuider(denoiser, [chamfer(jacobian="exact", timing=Timing(every=2))], base)))
        assert calls == [4 * 2 + 2]

    @pytest.mark.parametrize("kind", MODULAR)
    def test_at_scale_zero_it_is_its_base_to_the_bit(self, kind):
        pipeline, base = PIPELINES[kind](), ClassifierFreeGuidance(guidance_scale=3.0)
        denoiser = denoiser_of(pipeline)  # freezes the weights, which alone changes torch's rounding on a CPU
        wanted = run(modular(pipeline, base))
        assert torch.equal(run(modular(pipeline, HandfulGuider(denoiser, [chamfer(0.0)], base))), wanted)

    def test_diffusers_apg_is_the_same_as_its_base_as_its_plain_guider_and_as_a_term_of_ours(self):
        pipeline = tiny_sdxl()
        denoiser = denoiser_of(pipeline)

        def apg() -> AdaptiveProjectedGuidance:
            return AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.3)

        assert off(run(modular(pipeline, apg())), ours(denoiser, [Guider(apg(), space="eps")])) < 1e-4
        both = run(modular(pipeline, HandfulGuider(denoiser, [chamfer()], apg())))
        assert off(both, ours(denoiser, [Guider(apg(), space="eps"), chamfer()])) < 1e-4
        assert off(both, ours(denoiser, [CFG(2.0), chamfer()])) > 1e-3

    def test_any_scheduler_may_follow(self):
        """DPM-Solver++(2M), fed by hand with the predictions of our guided denoiser."""
        pipeline = tiny_sdxl()
        denoiser, terms = denoiser_of(pipeline), [chamfer()]
        scheduler = diffusers.DPMSolverMultistepScheduler(**TRAINED)
        found = run(modular(pipeline, HandfulGuider(denoiser, terms), scheduler), 6)
        by_hand = diffusers.DPMSolverMultistepScheduler(**TRAINED)
        by_hand.set_timesteps(6)
        x, guided, levels = noise(), Guided(denoiser, terms), denoiser.levels
        condition = denoiser.condition([PROMPT] * N)
        assert isinstance(levels, VP)
        for index, t in enumerate(by_hand.timesteps):
            at = Level(levels.alpha[t], levels.sigma[t], index, index / 5)
            x = by_hand.step(output_from("eps", x, guided(x, at, condition), at), t, x).prev_sample
        assert off(found, x) < 1e-4

    def test_terms_that_ask_for_the_null_condition_are_refused(self):
        denoiser = denoiser_of(tiny_sdxl())
        for term in (CFG(1.0), Guider(AdaptiveProjectedGuidance())):
            with pytest.raises(RequestError, match=f"terms: '{term.name}': .*base=ClassifierFreeGuidance"):
                HandfulGuider(denoiser, [term])

    def test_latents_of_another_shape_than_the_denoisers_are_refused(self):
        pipeline = tiny_sdxl()
        large = from_pipeline(pipeline, resolution=(2 * SIDE, SIDE))
        with pytest.raises(RequestError, match=r"pipeline: \(2, 4, 8, 8\): .*\(n, 4, 16, 8\)"):
            run(modular(pipeline, HandfulGuider(large, [chamfer()])))

    def test_blocks_that_call_their_network_unseen_are_refused(self):
        pipeline = tiny_sdxl()
        guider = HandfulGuider(denoiser_of(pipeline), [chamfer()])
        run(modular(pipeline, guider))
        guider.set_state(0, 4, torch.tensor(999))
        (batch,) = guider.prepare_inputs({})
        batch.noise_pred = noise()
        with pytest.raises(RequestError, match="do not call their network between"):
            guider([batch])

    def test_flux_blocks_ask_no_guider(self):
        assert "guider" not in FluxAutoBlocks().init_pipeline()._component_specs


@pytest.mark.parametrize("levels", [VP.linear(), VP.cosine(), Flow(3.0), Flow(time_scale=1.0)])
def test_the_level_of_a_told_time_is_the_one_that_tells_it(levels):
    for at in levels.spacing(7, "linspace"):
        if at.sigma > 0:
            alpha, sigma = level_of_time(levels, levels.time(at))
            torch.testing.assert_close(alpha / sigma, at.alpha / at.sigma, rtol=1e-9, atol=1e-12)
    if isinstance(levels, VP):
        between = torch.tensor(123.4, dtype=torch.float64)
        alpha, sigma = level_of_time(levels, between)
        torch.testing.assert_close(levels.time(Level(alpha, sigma)), between, rtol=1e-9, atol=0)

"""What a recipe costs: against the same work counted as it really runs, and against what is known of published models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from support.pipelines import tiny_stable_diffusion
from support.pipelines_dit import tiny_dit

from handful.core.samplers import SAMPLERS, STOCHASTIC
from handful.cost.estimate import cost_of, evaluated, outline, text_encoders
from handful.cost.operations import Count
from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.guidance import Guided
from handful.guidance.method import Context, make_terms, views
from handful.models import load, skeleton
from handful.models.architectures import packaged_configs, packaged_names
from handful.models.latent import LatentDenoiser
from handful.recipe.extractors import extractors_wanted, load_for
from handful.recipe.file import overridden, read_mapping, read_recipe
from handful.recipe.resolve import complete, model_options, resolve
from handful.recipe.schema import Recipe, recipe_from

RECIPES = Path(__file__).parents[2] / "recipes"
FULL_SIZE = ("sd15", "sd35-medium", "dit-xl-2-256")
K, N = 5, 6  # exemplars, images of a cohort
CHAMFER = {"method": "chamfer", "features": "digits-guide"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each kind: pixels with labels and attention, latents with labels, latents with prompts."""
    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            num_class_embeds=4,
        ).save_pretrained(root / "pixels" / "unet")
    DDPMScheduler().save_pretrained(root / "pixels" / "scheduler")
    tiny_dit(root / "dit", classes=3)
    tiny_stable_diffusion(root / "prompts")
    return {name: str(root / name) for name in ("pixels", "dit", "prompts")}


def recipe(name: str, *guidance: dict[str, Any], **changes: Any) -> Recipe:
    """Of N images at four steps."""
    asked: dict[str, Any] = {
        "model": {"name": name},
        "exemplars": {"path": "there is no such folder", "k": K},
        "per_class": N,
        "cohort": N,
        "classes": ["cat"] if name.endswith("prompts") else None,
        "sampler": {"name": "dpmpp_2m", "steps": 4},
        "guidance": list(guidance),
    }
    return recipe_from(asked | changes)


def counted(asked: Recipe) -> Count:
    """The operations and the peak of what `generate` does for a cohort: guided sampling and decoding, on the CPU."""
    asked, _ = complete(asked)
    denoiser = load(asked.model.name, model_options(asked))
    if denoiser.label_count and denoiser.null_class is None:
        denoiser.null_class = denoiser.label_count - 1
    resolved = resolve(asked, denoiser, None)
    guidance = resolved.recipe.guidance or ()
    if isinstance(denoiser, LatentDenoiser):
        denoiser.linear_preview = torch.randn(3, denoiser.shape[0] + 1)
    extractors = {key: load_for(term) for key, term in extractors_wanted(guidance).items()}
    channels, height, width = denoiser.image_shape
    with torch.no_grad():
        features = {
            (name, reduce): extractors[name](torch.randn(K, channels, height // reduce, width // reduce).clamp(-1, 1))
            for name, reduce in views(guidance)
        }
    guided = Guided(denoiser, make_terms(guidance, Context(extractors, features, range(N))), asked.chunk)
    sampler, x = resolved.recipe.sampler, torch.randn(N, *denoiser.shape)
    condition = guided.condition(["cat"] * N if denoiser.prompted else [0] * N)
    options: dict[str, Any] = {"noise": lambda: torch.randn_like(x)} if sampler.name in STOCHASTIC else {}
    options |= {"recurrence": sampler.recurrence} if sampler.name in STOCHASTIC else {}
    with torch.no_grad(), Count() as count:
        x0 = SAMPLERS[sampler.name](guided, x, resolved.levels, condition, **options)
        torch.cat([guided.decode(part) for part in x0.split(asked.chunk or N)])
    return count


WAYS = {
    "plain": [],
    "cfg": [{"method": "cfg", "scale": 2.0}],
    "chamfer": [CHAMFER],
    "every second step": [{**CHAMFER, "every": 2, "hold": True}],
    "gaussian": [{**CHAMFER, "every": 1, "jacobian": "gaussian"}],
    "energy": [{"method": "energy", "features": "pixels", "every": 2}],
    "whole images": [{**CHAMFER, "every": 2, "reduce": 1}],
    "chamfer and cfg": [{**CHAMFER, "every": 2}, {"method": "cfg", "every": 2, "interval": [0.3, 1.0]}],
    "cads and apg": [{"method": "cads", "tau1": 0.4}, {"method": "apg", "scale": 2.0}],
    "inner steps": [{"method": "vendi", "features": "pixels", "jacobian": "identity", "inner": 3, "every": 2}],
    "smoothed": [{**CHAMFER, "smoothing": {"samples": 3, "noise": 0.1}}],
    "two that share a look": [{**CHAMFER, "every": 1}, {**CHAMFER, "every": 2, "jacobian": "identity"}],
}


@pytest.mark.parametrize(
    ("way", "model"),
    [*((way, "dit") for way in WAYS), ("cfg", "pixels"), ("every second step", "pixels"), ("chamfer and cfg", "prompts")],
)
def test_the_cost_is_exactly_what_is_counted_as_it_runs(way: str, model: str, models: dict[str, str]):
    asked = recipe(models[model], *WAYS[way])
    found = cost_of(asked)
    assert found.recipe.flops_per_image * N == counted(asked).total > 0
    assert sum(found.recipe.parts.values()) == pytest.approx(found.recipe.flops_per_image)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 2},
        {"sampler": {"name": "heun", "steps": 3}},
        {"sampler": {"name": "ddim", "steps": 3, "eta": 1.0}},
        {"sampler": {"name": "ddpm", "steps": 3}},
        {"sampler": {"name": "ddim", "steps": 3, "recurrence": 2}},
    ],
    ids=["chunks", "heun", "ddim", "ddpm", "recurrence"],
)
def test_and_so_in_chunks_and_by_every_sampler(changes: dict[str, Any], models: dict[str, str]):
    asked = recipe(models["dit"], {**CHAMFER, "every": 2, "reduce": 1}, **changes)
    assert cost_of(asked).recipe.flops_per_image * N == counted(asked).total


def test_the_peak_is_near_what_is_held_as_it_runs(models: dict[str, str]):
    asked = recipe(models["prompts"], {**CHAMFER, "reduce": 1})
    found = cost_of(asked)
    weights = sum(p.numel() * p.element_size() for p in load(models["prompts"]).parameters())
    guide = sum(p.numel() * p.element_size() for p in load_extractor("digits-guide").parameters())
    assert found.recipe.peak_bytes - weights - guide == pytest.approx(counted(asked).peak, rel=0.1)
    assert found.plain.peak_bytes < found.recipe.peak_bytes


def test_no_weights_and_no_exemplars_are_read(models: dict[str, str], tmp_path: Path):
    bare = tmp_path / "dit"
    shutil.copytree(models["dit"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert cost_of(recipe(str(bare), CHAMFER)).recipe == cost_of(recipe(models["dit"], CHAMFER)).recipe


def test_guidance_that_measures_its_strength_is_counted_without_data(models: dict[str, str]):
    auto, energy = (cost_of(recipe(models["pixels"], {**CHAMFER, "method": name})).recipe for name in ("auto", "energy"))
    assert auto.flops_per_image == pytest.approx(energy.flops_per_image, rel=0.01)


def test_classifier_free_guidance_takes_twice_the_denoiser_also_where_there_is_no_null_class(models: dict[str, str]):
    named = {"name": models["pixels"], "classes": ["a", "b", "c", "d"]}  # all four labels: none is left for no class
    found = cost_of(recipe(models["pixels"], CHAMFER, model=named))
    assert not found.null_condition
    assert found.cfg.flops_per_image == 2 * found.plain.flops_per_image
    assert found.cfg.evaluations == 2 * found.plain.evaluations == 8


def test_a_recipe_whose_guidance_the_model_cannot_have_is_refused(models: dict[str, str]):
    named = {"name": models["pixels"], "classes": ["a", "b", "c", "d"]}
    with pytest.raises(RequestError, match="no null class"):
        cost_of(recipe(models["pixels"], {"method": "cfg"}, model=named))


def test_a_term_acts_on_its_own_steps_and_a_held_direction_costs_nothing(models: dict[str, str]):
    often, seldom = (cost_of(recipe(models["dit"], {**CHAMFER, "every": n, "hold": n > 1})) for n in (1, 4))
    assert (often.guided, seldom.guided) == ([("chamfer", 4)], [("chamfer", 1)])
    extra = [found.recipe.flops_per_image - found.plain.flops_per_image for found in (often, seldom)]
    assert extra[0] == pytest.approx(4 * extra[1])


def test_the_cheap_jacobian_spares_the_way_back_through_the_denoiser(models: dict[str, str]):
    exact, gaussian = (cost_of(recipe(models["dit"], {**CHAMFER, "jacobian": j})).recipe.parts for j in ("exact", "gaussian"))
    assert {part: flops for part, flops in exact.items() if part != "denoiser backward"} == gaussian


def test_a_smaller_look_decodes_less_and_the_linear_one_next_to_nothing(models: dict[str, str]):
    whole, half, linear = (
        cost_of(recipe(models["prompts"], {**CHAMFER, "reduce": reduce})).recipe.parts["preview"] for reduce in (1, 2, 8)
    )
    assert half == pytest.approx(whole / 4, rel=0.1)
    assert linear < whole / 100


def test_exemplars_and_prompts_are_told_once_a_class(models: dict[str, str]):
    found = cost_of(recipe(models["prompts"], CHAMFER))
    assert set(found.once_per_class) == {"features: digits-guide, 1/8 size", "encoding exemplars", "text_encoder"}
    twice = cost_of(recipe(models["prompts"], CHAMFER, exemplars={"path": "nowhere", "per_class": 2 * K}))
    assert twice.once_per_class["encoding exemplars"] == 2 * found.once_per_class["encoding exemplars"] > 0
    assert twice.once_per_class["text_encoder"] == found.once_per_class["text_encoder"] > 0


@pytest.mark.parametrize(("sampler", "asked"), [("dpmpp_2m", 7), ("ddim", 7), ("ddpm", 7), ("heun", 13)])
def test_levels_are_those_at_which_the_sampler_asks(sampler: str, asked: int, models: dict[str, str]):
    made, _ = complete(recipe(models["dit"], sampler={"name": sampler, "steps": 7}))
    denoiser = load(models["dit"])
    resolved = resolve(made, denoiser, None)
    levels = evaluated(resolved.levels, resolved.recipe)
    assert len(levels) == asked
    assert {level.index for level in levels} == set(range(7))


# Parameters in millions, as the models' own papers and cards say.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859.5,
    "stabilityai/stable-diffusion-2-1": 865.9,
    "stabilityai/stable-diffusion-xl-base-1.0": 2567.5,
    "stabilityai/stable-diffusion-3.5-medium": 2243.2,  # 2.5 B with its table of positions, which is no parameter
    "stabilityai/stable-diffusion-3.5-large": 8056.6,
    # 675 M; diffusers' has the embedding of time and label (2.777 M) in each of its 28 blocks, not once, and the table of
    # positions (0.295 M) not among its parameters
    "facebook/DiT-XL-2-256": 675.1 + 27 * 2.777 - 0.295,
    "facebook/DiT-XL-2-512": 675.1 + 27 * 2.777 - 0.295,
    "black-forest-labs/FLUX.1-dev": 11901.4,
}


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_architectures_have_the_published_sizes(name: str):
    source = packaged_configs(name)
    assert source is not None
    found = skeleton(source)
    sizes = {part: sum(p.numel() for p in network.parameters()) / 1e6 for part, network in found.named_children()}
    sixteen_channels = found.shape[0] == 16
    assert sizes == pytest.approx({"network": PUBLISHED[name], "vae": 83.82 if sixteen_channels else 83.65}, abs=0.06)


def test_every_published_model_that_is_known_is_tested():
    assert set(PUBLISHED) == set(packaged_names())


def test_text_encoders_have_the_published_sizes_and_can_be_left_out():
    source = packaged_configs("stabilityai/stable-diffusion-3.5-medium")
    _, sizes = text_encoders(source)
    assert [round(size / 1e6) for size in sizes.values()] == [124, 695, 4762]
    assert list(text_encoders(source, ["text_encoder_3"])[1]) == ["text_encoder", "text_encoder_2"]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    # 118.6 G multiply-adds for DiT-XL/2 (Peebles & Xie 2023, table 4); the others were measured by torch's FlopCounterMode
    [("facebook/DiT-XL-2-256", 2 * 0.1186), ("stable-diffusion-v1-5/stable-diffusion-v1-5", 0.803)],
)
def test_a_forward_pass_takes_the_published_operations(name: str, teraflops: float):
    classes = None if "DiT" in name else ["cat"]
    found = cost_of(recipe(name, classes=classes, cohort=1, sampler={"steps": 1}))
    assert found.plain.parts["denoiser"] / 1e12 == pytest.approx(teraflops, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_chamfer_by_default_takes_at_most_six_tenths_of_classifier_free_guidance(name: str):
    chamfer, cfg = cost_of(read_recipe(RECIPES / f"{name}-chamfer.yaml")), outline(read_recipe(RECIPES / f"{name}-cfg.yaml"))
    assert chamfer.steps == 40
    assert chamfer.ratio_to_cfg <= 0.60
    assert cfg.way(cfg.recipe.guidance or ()).flops_per_image == chamfer.cfg.flops_per_image


def test_a_mixture_costs_the_mean_of_its_settings_and_is_compared_with_sampling_from_noise(models: dict[str, str]):
    noised = {"start": {"from": "exemplars", "depth": 0.5}}
    guided, whole = {"guidance": [CHAMFER]}, cost_of(recipe(models["pixels"]))
    started, chamfer = (cost_of(recipe(models["pixels"], **way)) for way in (noised, guided))
    mixture = {"guidance": None, "mix": [{"share": 1, **noised}, {"share": 3, **guided}]}
    mixed = cost_of(recipe(models["pixels"], **mixture))
    assert (started.recipe.evaluations, started.ratio_to_plain) == (2, 0.5)
    assert {each.plain.flops_per_image for each in (started, chamfer, mixed, whole)} == {whole.recipe.flops_per_image}
    assert mixed.recipe.flops_per_image == pytest.approx(
        started.recipe.flops_per_image / 4 + chamfer.recipe.flops_per_image * 3 / 4
    )
    assert sum(mixed.recipe.parts.values()) == pytest.approx(mixed.recipe.flops_per_image)
    assert mixed.recipe.peak_bytes == chamfer.recipe.peak_bytes
    assert "from noise, with all 4 steps" in mixed.notes[-1]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_recipes_state_no_setting_of_chamfer(name: str):
    assert read_mapping(RECIPES / f"{name}-chamfer.yaml")["guidance"] == [{"method": "chamfer", "features": "dinov2"}]


def test_a_hub_name_that_is_not_known_here_names_the_cache_when_offline(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="cache") as refused:
        cost_of(recipe("nobody/knows-this", CHAMFER, classes=["cat"]))
    assert str(constants.HF_HUB_CACHE) in str(refused.value)


def test_packaged_facts_are_never_loaded_as_weights(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="cache"):
        load("facebook/DiT-XL-2-256")


def test_a_directory_of_a_known_name_is_taken_for_itself(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(models["dit"], tmp_path / "facebook" / "DiT-XL-2-256")
    monkeypatch.chdir(tmp_path)
    asked = overridden({"model": {"name": "facebook/DiT-XL-2-256"}, "guidance": []}, {})
    assert cost_of(recipe_from(asked)).networks["network"] < 1e6


def test_a_tiny_decoder_is_counted_for_latents_of_any_width():
    for name, channels in (("facebook/DiT-XL-2-256", 4), ("stabilityai/stable-diffusion-3.5-medium", 16)):
        source = packaged_configs(name)
        assert source is not None
        tiny: Any = skeleton(source, preview_decoder="madebyollin/any").preview_vae
        assert tiny.config.latent_channels == channels


def test_through_a_tiny_decoder_no_exemplar_is_encoded():
    name = "stabilityai/stable-diffusion-3.5-medium"
    data = {"model": {"name": name, "preview_decoder": "madebyollin/taesd3", "resolution": [64, 64]}, "per_class": 1}
    term = {"method": "chamfer", "features": "pixels", "reduce": 2}
    through = cost_of(recipe_from({**data, "exemplars": {"path": "/x"}, "guidance": [term]}))
    assert through.recipe.parts["preview"] > 0
    assert "encoding exemplars" not in through.once_per_class

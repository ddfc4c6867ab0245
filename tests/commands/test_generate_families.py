"""Every family of models through the command line, from files on a disk to files on a disk; and what is refused on the way.

The models are diffusers' own classes, tiny and random. Refusals are tried on pipelines without their weights, so that a
refusal that had to read them would be another one.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from support import adm, pictures
from support.edm import Preconditioned
from support.killed import killed as kill
from support.pipelines import tiny_sdxl, tiny_stable_diffusion
from support.pipelines_dit import tiny_dit
from support.pipelines_flow import tiny_flux, tiny_sd3
from support.runs import contents
from support.vision import save_vision_model

from handful import cli, console

QUICK = ("--per-class", 2, "--steps", 2, "--k", 3)
IN_PIXELS = ("--features", "pixels")
PATTERN = "model.class_pattern='{region}--{object}'"


def handful(*arguments: object) -> int:
    return console.answer(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and exemplars: animals/{ant,bee}, four/{ant,bee,cow,doe}, labels/{1,207}, regions/{Africa--hand_soap,...}."""
    root = tmp_path_factory.mktemp("disk")
    tiny_stable_diffusion(root / "sd")
    tiny_sdxl(root / "sdxl")
    tiny_sd3(root / "sd3")
    tiny_flux(root / "flux")
    tiny_dit(root / "dit")
    for name in ("sd", "sd3"):
        shutil.copytree(root / name, root / f"{name}-without-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    adm.saved(root, adm.Variant(classes=4), name="adm.pt")
    (root / "edm.pkl").write_bytes(pickle.dumps({"ema": Preconditioned()}))
    (root / "edm.py").write_text("from support.edm import Preconditioned\n\n\ndef network():\n    return Preconditioned()\n")
    unet(root / "unet", None)
    unet(root / "unet-classes", 5)
    (root / "unet-classes" / "handful.json").write_text('{"classes": ["ant", "bee", "cow", "doe"], "null_class": 4}')
    for name, channels in (("tiny", 4), ("tiny16", 16)):
        AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        ).save_pretrained(root / name)
    for name, kind in (("dino", "Dinov2Model"), ("resnet", "ResNetForImageClassification"), ("bert", "BertModel")):
        (root / name).mkdir()
        save_vision_model(root / name, kind)
    random = np.random.default_rng(0)
    folders = {"animals": "ant bee", "four": "ant bee cow doe", "labels": "1 207", "regions": "Africa--hand_soap Europe--stove"}
    for folder, classes in folders.items():
        for name in classes.split():
            for place in range(4):
                blocks = random.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                pictures.save(root / folder / name / f"{place}.png", blocks)
    return root


def unet(folder: Path, labels: int | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=labels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)


def images(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("images/*/*.png"))}


BOTH = ("--guidance", "chamfer", "--guidance", "cfg")
RUNS = {
    "unet, unconditional": ("unet", "animals", *IN_PIXELS, "--sampler", "ddpm"),
    "unet, classes and null": ("unet-classes", "animals", *BOTH, "--features", "./resnet", "--sampler", "ddim"),
    "adm, learned variance": ("adm.pt", "four", *IN_PIXELS, "--sampler", "ddpm", "--set", "sampler.variance=learned"),
    "edm, a file": ("edm.py:network", "four", *IN_PIXELS, "--sampler", "heun"),
    "edm, a pickle": (
        "edm.pkl",
        "four",
        "--trust-pickle",
        "--null-class",
        4,
        *BOTH,
        "--features",
        "./dino",
        "--sampler",
        "heun",
    ),
    "dit": ("dit", "labels", *BOTH, "--features", "./dino", "--sampler", "ddpm"),
    "sd": ("sd", "animals", "--features", "./dino", "--sampler", "heun"),
    "sd, classifier, energy": ("sd", "animals", "--guidance", "energy", "--features", "./resnet", "--sampler", "ddim"),
    "sd, tiny decoder": (
        "sd",
        "animals",
        "--features",
        "./dino",
        "--set",
        "model.preview_decoder=tiny",
        "--set",
        "guidance.chamfer.reduce=4",
    ),
    "sd, bfloat16, slicing": (
        "sd",
        "animals",
        "--features",
        "./dino",
        "--dtype",
        "bfloat16",
        "--set",
        "model.vae_slicing=true",
    ),
    "sdxl, resolution": ("sdxl", "animals", *BOTH, "--features", "./dino", "--set", "model.resolution=[128,64]"),
    "sd3, pattern": ("sd3", "regions", *BOTH, "--features", "./resnet", "--template", "{object} in {region}", "--set", PATTERN),
    "flux, attention": (
        "flux",
        "animals",
        "--features",
        "./dino",
        "--set",
        "model.resolution=[64,64]",
        "--set",
        "model.attention=native",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_family_generates_its_classes_and_its_written_recipe_gives_the_same_images(name, disk, tmp_path, monkeypatch):
    monkeypatch.chdir(disk)
    model, exemplars, *more = RUNS[name]
    out, again = tmp_path / "out", tmp_path / "again"
    assert handful("generate", "--model", model, "--exemplars", exemplars, *QUICK, *more, "--out", out) == 0
    made = images(out)
    classes = sorted(path.name for path in (disk / exemplars).iterdir())
    assert [*made] == [f"images/{each}/00000{place}.png" for each in classes for place in range(2)]
    assert len(set(made.values())) == len(made), "two images are the same"
    monkeypatch.chdir(tmp_path)  # the recipe names its files from anywhere
    assert handful("generate", out / "recipe.yaml", "--out", again) == 0
    assert images(again) == made


def test_class_names_become_prompts_by_pattern_and_template(disk, tmp_path):
    asked = ("--model", disk / "sd", "--exemplars", disk / "regions", *IN_PIXELS, *QUICK, "--out", tmp_path / "out")
    assert handful("generate", *asked, "--template", "{object} in {region}", "--set", PATTERN) == 0
    prompts = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"]["prompts"]
    assert prompts == {"Africa--hand_soap": "hand soap in Africa", "Europe--stove": "stove in Europe"}


def test_the_resolution_asked_for_is_that_of_the_images(disk, tmp_path):
    asked = ("--model", disk / "sd", "--guidance", "none", "--classes", "ant", "--per-class", 1, "--steps", 2)
    assert handful("generate", *asked, "--set", "model.resolution=[48,96]", "--out", tmp_path / "out") == 0
    assert Image.open(tmp_path / "out" / "images" / "ant" / "000000.png").size == (96, 48)


def test_cfg_changes_what_a_text_model_draws(disk, tmp_path):
    asked = ("--model", disk / "sd", "--classes", "ant,bee", "--per-class", 1, "--steps", 2)
    for method in (("none",), ("cfg", "--scale", 5)):
        assert handful("generate", *asked, "--guidance", *method, "--out", tmp_path / method[0]) == 0
    plain, guided = images(tmp_path / "none"), images(tmp_path / "cfg")
    assert all(plain[name] != guided[name] for name in plain)


def test_a_dry_run_of_a_text_model_writes_nothing(disk, tmp_path, capsys):
    asked = ("--model", disk / "sd", "--exemplars", disk / "animals", *IN_PIXELS, "--out", tmp_path / "out", "--dry-run")
    assert handful("generate", *asked, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["model"]["prompts"] == {"ant": "a photo of a ant", "bee": "a photo of a bee"}
    assert not (tmp_path / "out").exists()


def command(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "handful.cli", *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_killed_run_through_the_linear_preview_ends_with_the_same_bytes(disk, tmp_path):
    asked = (
        "generate",
        "--model",
        disk / "sd",
        "--exemplars",
        disk / "animals",
        "--features",
        disk / "dino",
        "--k",
        3,
        "--per-class",
        16,
        "--cohort",
        2,
        "--steps",
        6,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert handful(*asked, "--out", whole) == 0
    kill([*asked, "--out", killed], lambda: len(list(killed.glob(".handful/cohorts/*.parquet"))) >= 2)
    assert not (killed / "manifest.parquet").exists()
    assert handful(*asked, "--out", killed) == 0
    assert contents(killed) == contents(whole)


@pytest.mark.slow
def test_a_quiet_run_of_a_pipeline_leaves_nothing_on_stderr(disk, tmp_path):
    asked = ("--model", disk / "sd", "--exemplars", disk / "animals", *IN_PIXELS, *QUICK, "--out", tmp_path / "out", "--quiet")
    process = command("generate", *asked)
    assert process.communicate() == ("", "")
    assert process.returncode == 0


SD, SD3 = "sd-without-weights", "sd3-without-weights"
REFUSED = {
    "no classes for a text model": ((SD, "--guidance", "none"), "classes: this model takes prompts"),
    "a null label for a text model": ((SD, "--classes", "a", "--null-class", 3), "model.null_class: 3: .*takes prompts"),
    "names of labels for a text model": ((SD, "--classes", "a", "--class-names", "a,b"), "model.classes: .*takes prompts"),
    "an unknown class": (("unet-classes", "--classes", "ant,bear"), "classes: 'bear': the model knows no such class"),
    "a prompt for a label model": (
        ("unet-classes", "--set", "model.negative_prompt=x"),
        "model.negative_prompt: .*does not use it",
    ),
    "sides off the latents' grid": ((SD, "--classes", "a", "--set", "model.resolution=[60,64]"), r"model.resolution: .*Use 64"),
    "more than the positions": (
        (SD3, "--classes", "a", "--set", "model.resolution=[256,256]"),
        "model.resolution: .*for 128 pixels",
    ),
    "another size of a UNet": (("unet", "--set", "model.resolution=[16,16]"), "model.resolution: .*images are 8 x 8"),
    "cfg without a null class": (("unet", "--guidance", "cfg"), r"guidance\[0\]: 'cfg': this model has no null class"),
    "a template without a place": ((SD, "--classes", "a", "--template", "a photo"), "model.template: 'a photo': .*no place"),
    "a pattern that does not fit": (
        (SD, "--classes", "a", "--template", "{object} in {region}", "--set", PATTERN),
        "model.class_pattern: .*'a' does not",
    ),
    "a variance never learned": (
        (SD, "--classes", "a", "--sampler", "ddpm", "--set", "sampler.variance=learned"),
        "sampler.variance: 'learned': .*not",
    ),
    "an unknown precision": ((SD, "--classes", "a", "--dtype", "bf16"), "model.dtype: 'bf16': .*Did you mean 'bfloat16'"),
    "a part that is needed": ((SD, "--classes", "a", "--set", "model.without=[unet]"), "model.without: 'unet': "),
    "offloading on the CPU": ((SD, "--classes", "a", "--device", "cpu", "--set", "model.offload=model"), "model.offload: "),
    "slicing without autoencoder": (("unet", "--set", "model.vae_slicing=true"), "model.vae_slicing: True: .*no autoencoder"),
    "attention without a choice": ((SD, "--classes", "a", "--set", "model.attention=native"), "model.attention: 'native': "),
    "a pickle that is not trusted": (("edm.pkl",), "model: .*it is a pickle.*--trust-pickle"),
    "no such directory": (("./nowhere",), "model: .*nowhere': there is no such directory"),
    "no diffusion model": (("./dino",), "model: .*dino': it is a text encoder or classifier .*not a pipeline"),
}
REFUSED_WITH_EXEMPLARS = {
    "a shrinking that leaves a rest": ((*IN_PIXELS, "--set", "guidance.chamfer.reduce=3"), r"guidance\[0\].reduce: 3: "),
    "an extractor of texts": (("--features", "./bert"), ".*features: .*bert': a BertModel takes input_ids, not images"),
    "a tiny decoder of other latents": (
        (*IN_PIXELS, "--set", "model.preview_decoder=tiny16", "--set", "guidance.chamfer.reduce=4"),
        "model.preview_decoder: ",
    ),
    "offloading and an exact jacobian": (("--features", "./dino", "--set", "model.offload=model"), "model.offload: 'model': "),
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_WITH_EXEMPLARS])
def test_a_wrong_request_ends_in_one_line_before_weights_are_read_and_writes_nothing(name, disk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(disk)
    if name in REFUSED:
        asked, told = REFUSED[name]
        asked = asked if "--guidance" in asked else (*asked, "--guidance", "none")
    else:
        asked, told = REFUSED_WITH_EXEMPLARS[name]
        asked = (SD, "--exemplars", "animals", *asked)
    assert handful("generate", "--model", *asked, "--out", tmp_path / "out") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("The config attributes")]  # diffusers'
    assert len(said) == 1
    assert re.match(f"error: {told}", said[0]), said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]},
            "StableDiffusionControlNetPipeline",
        ),
        ({"text_encoder": [None, None]}, "the pipeline has no text_encoder"),
        (None, "model_index.json': it can't be read"),
    ],
)
def test_a_pipeline_of_another_kind_or_a_damaged_one_is_refused(change, told, disk, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(disk / SD, model)
    index = model / "model_index.json"
    index.write_text("{no" if change is None else json.dumps({**json.loads(index.read_text()), **change}))
    assert handful("generate", "--model", model, "--classes", "a", "--guidance", "none", "--out", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3", "flux"])
def test_the_cost_of_a_local_pipeline_needs_neither_weights_nor_exemplars(model, disk, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(disk / model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(folder)},
                "exemplars": {"path": "nowhere"},
                "classes": ["ant"],
                "cohort": 2,
                "per_class": 2,
                "sampler": {"steps": 40},
                "guidance": [{"method": "chamfer", "features": "pixels"}],
            }
        )
    )
    assert handful("cost", recipe, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["evaluations"], found["cfg"]["evaluations"]) == (40, 80)
    assert 0.4 < found["ratio_to_cfg"] < 1
    assert found["flops_per_image"] == pytest.approx(sum(found["parts"].values()))


def test_prompts_of_a_file_are_drawn_per_image_and_written_to_the_manifest(disk, tmp_path):
    (tmp_path / "p.csv").write_text("class,prompt\nant,a red ant\nant,an ant at night\nbee,a bee\n")
    asked = ("--model", disk / "sd", "--guidance", "none", "--classes", "ant,bee", "--per-class", 6, "--steps", 2)
    assert handful("generate", *asked, "--prompts", tmp_path / "p.csv", "--out", tmp_path / "out") == 0
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    told = {row["file"]: row["prompt"] for row in rows}
    assert {row["prompt"] for row in rows if row["class"] == "ant"} == {"a red ant", "an ant at night"}
    assert {row["prompt"] for row in rows if row["class"] == "bee"} == {"a bee"}
    made = images(tmp_path / "out")
    assert handful("generate", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "again") == 0
    assert images(tmp_path / "again") == made
    # each image is the one that its prompt alone gives
    one = next(file for file, prompt in told.items() if prompt == "a red ant")
    alone = ("--set", "model.prompts.ant=a red ant", "--set", "model.prompts.bee=a bee")
    assert handful("generate", *asked, *alone, "--out", tmp_path / "alone") == 0
    pairs = zip(np.asarray(Image.open(tmp_path / "out" / one)), np.asarray(Image.open(tmp_path / "alone" / one)), strict=True)
    assert all(abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in pairs)

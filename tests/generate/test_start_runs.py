"""Images that start from noised exemplars: what a step back gives, every sampler, evenly spread, whatever the cohort."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.pipelines_dit import tiny_dit
from support.runs import contents, digits_recipe

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import VP, Level, noised
from handful.core.samplers import SAMPLERS
from handful.cost.estimate import cost_of
from handful.data.images import read_image
from handful.errors import RequestError
from handful.generate import prepare
from handful.generate.describe import plan_as_text
from handful.generate.run import run
from handful.recipe.file import read_recipe
from handful.recipe.plan import setting_of, start_places
from handful.recipe.resolve import complete
from handful.recipe.schema import Recipe

EVERY = {"guidance": [], "sampler": {"steps": 6}}


def asked(folder: Path, depth: float = 0.5, **changes: Any) -> Recipe:
    return digits_recipe(folder, **{**EVERY, "start": {"from": "exemplars", "depth": depth}, **changes})


def images(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith(".png") and name.startswith("images")}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "ddpm", "heun"])
def test_the_shallower_the_start_the_nearer_an_image_is_to_its_exemplar(sampler: str, digits_folder: Path, tmp_path: Path):
    """The distance to the exemplar that an image starts from, against that to the others of the class, by depth."""
    ratios = []
    for depth in (0.17, 0.5, 1.0):
        out = tmp_path / f"{depth}"
        job = prepare(asked(digits_folder, depth, sampler={"name": sampler, "steps": 6}), out)
        assert job.levels.steps == round(6 * depth)
        assert run(job).failures == []
        own = others = 0.0
        for row in pq.read_table(out / "manifest.parquet").to_pylist():
            image = read_image(out / row["file"], channels=1)
            called = job.exemplars.called(row["class"])  # type: ignore[union-attr]
            far = (job.exemplars.images[row["class"]] - image).square().mean((1, 2, 3)).tolist()  # type: ignore[union-attr]
            place = called.index(row["started_from"].split("/")[1])
            own, others = own + far.pop(place), others + sum(far) / len(far)
        ratios.append(own / others)
    assert ratios[0] < 0.2
    assert ratios[0] < ratios[1] < ratios[2]


class Ideal(Denoiser):
    """E[x0 | x_t] for unit-variance Gaussian data around m."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.levels = (1, 2, 2), VP.cosine()

    def forward(self, x_t: torch.Tensor, level: Level, condition: Condition) -> torch.Tensor:
        return level.alpha / level.total**2 * x_t

    def condition(self, labels: Any) -> Condition:
        return Condition()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "heun"])
def test_from_data_noised_to_any_depth_a_perfect_model_gives_data_again(sampler: str):
    """Of N(0, 1) data the ODE keeps N(0, 1): the noised start has it, and so has what comes out. 4 sigma of 40,000 draws."""
    draw = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(10_000, 1, 2, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    path = Ideal().levels.spacing(40).last(20)
    found = SAMPLERS[sampler](Ideal(), noised(x0, eps, path[0]), path, Condition())
    assert float(found.var()) == pytest.approx(1, abs=0.04)
    kept = float((found * x0).mean())
    assert kept == pytest.approx(float(path[0].alpha), abs=0.04), "as much of the exemplar is left as the start held"


def test_an_images_start_is_its_own_whatever_the_cohort_and_evenly_spread(digits_folder: Path, tmp_path: Path):
    run(prepare(asked(digits_folder), tmp_path / "four"))
    run(prepare(asked(digits_folder, cohort=3), tmp_path / "three"))
    assert images(tmp_path / "four") == images(tmp_path / "three"), "no term couples them"
    places = start_places(5, "cat", range(12), 4)
    assert Counter(places) == dict.fromkeys(range(4), 3)
    assert [start_places(5, "cat", [index], 4)[0] for index in range(12)] == places
    assert places != start_places(6, "cat", range(12), 4)


def test_from_other_classes_an_image_starts_from_each_of_their_exemplars_and_none_of_its_own(
    digits_folder: Path, tmp_path: Path
):
    def made(name: str, **changes: Any) -> tuple[dict[str, bytes], list[dict]]:
        start = {"from": "exemplars", "of": "others", "depth": 0.17}
        job = prepare(asked(digits_folder, start=start, **changes), tmp_path / name)
        assert run(job).failures == []
        drawn, rows = job.exemplars, pq.read_table(tmp_path / name / "manifest.parquet").to_pylist()
        assert drawn is not None
        far, seen = 0.0, dict[str, Counter]()
        for row in rows:
            name_there, called = row["started_from"].split("/")
            seen.setdefault(row["class"], Counter())[row["started_from"]] += 1
            exemplar = drawn.images[name_there][drawn.called(name_there).index(called)]
            far += float((exemplar - read_image(job.directory.path / row["file"], channels=1)).square().mean())
        assert far / len(rows) < 0.2, "so shallow a start leaves the exemplar"
        for own, names in seen.items():
            others = {name for name in drawn.classes if name != own}
            assert {each.split("/")[0] for each in names} <= others
            assert max(names.values()) - min(names.values()) <= 1
        return images(tmp_path / name), rows

    one, _ = made("one", classes=["1"], per_class=40)
    both, _ = made("both", per_class=40)
    assert one.items() <= both.items(), "an image does not depend on which other classes are generated"
    mix = [{"share": 1, "start": {"depth": 0.5}}, {"share": 1, "start": {"of": "others", "depth": 0.5}}]
    mixture = prepare(digits_recipe(digits_folder, sampler={"steps": 6}, cohort=2, mix=mix), tmp_path / "mix")
    assert run(mixture).failures == []
    rows = pq.read_table(tmp_path / "mix" / "manifest.parquet").to_pylist()
    assert {
        row["cohort"] % 2: {
            each["started_from"].startswith(each["class"] + "/") for each in rows if each["cohort"] % 2 == row["cohort"] % 2
        }
        for row in rows
    } == {0: {True}, 1: {False}}
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "1").symlink_to(digits_folder / "1")
    with pytest.raises(RequestError, match=r"start.of: 'others': there is one class alone"):
        prepare(
            asked(digits_folder, start={"of": "others"}, classes=["1"], exemplars={"path": str(alone), "k": 4}), tmp_path / "no"
        )


def test_the_other_classes_that_images_start_from_need_not_be_generated_where_exemplars_guide_too(
    digits_folder: Path, tmp_path: Path
):
    recipe = asked(digits_folder, start={"of": "others"}, guidance=[{"method": "energy"}], classes=["1"])
    assert run(prepare(recipe, tmp_path / "out")).failures == []
    begun = pq.read_table(tmp_path / "out" / "manifest.parquet", columns=["started_from"]).to_pylist()
    assert all(not row["started_from"].startswith("1/") for row in begun)


def test_it_composes_with_guidance_and_with_latents(digits_folder: Path, tmp_path: Path):
    energy = [{"method": "energy", "scale": 0.3}, {"method": "cfg", "scale": 1.0}]
    for name, guidance in (("plain", []), ("guided", energy)):
        assert run(prepare(asked(digits_folder, guidance=guidance), tmp_path / name)).failures == []
    assert images(tmp_path / "plain") != images(tmp_path / "guided")
    tiny_dit(tmp_path / "dit")
    latent = asked(digits_folder, model={"name": str(tmp_path / "dit")}, classes=["1"], per_class=2)
    assert run(prepare(latent, tmp_path / "latent")).failures == []
    assert "encoding exemplars" in cost_of(latent).once_per_class
    assert (cost_of(latent).steps, cost_of(latent).recipe.evaluations) == (6, 3)


def test_what_it_cannot_start_from_is_refused(digits_folder: Path, tmp_path: Path):
    with pytest.raises(RequestError, match=r"start: 'from exemplars, depth 0.5': there are no exemplars to start from"):
        prepare(asked(digits_folder, exemplars={}), tmp_path / "out")
    for depth in (0, 1.5):
        with pytest.raises(RequestError, match=r"^start\.depth"):
            asked(digits_folder, depth)
    with pytest.raises(RequestError, match=r"^start\.from: 'noise': there is no such choice"):
        digits_recipe(digits_folder, start={"from": "noise"})


# --- mixtures ----------------------------------------------------------------------------------------------------------

ENERGY = {"method": "energy", "scale": 0.3, "every": 1}
MIX = [{"share": 1, "start": {"depth": 0.5}}, {"share": 1, "guidance": [ENERGY]}]


def mixed(folder: Path, **changes: Any) -> Recipe:
    return digits_recipe(folder, **{"sampler": {"steps": 6}, "cohort": 2, "mix": MIX, **changes})


def test_each_cohort_of_a_mixture_is_what_its_setting_alone_makes_of_it(digits_folder: Path, tmp_path: Path):
    assert run(prepare(mixed(digits_folder), tmp_path / "mixed")).failures == []
    alone = [{"guidance": [], "start": {"depth": 0.5}, "mix": None}, {"guidance": [ENERGY], "mix": None}]
    for name, way in zip(("started", "guided"), alone, strict=True):
        run(prepare(mixed(digits_folder, **way), tmp_path / name))
    found = images(tmp_path / "mixed")
    rows = pq.read_table(tmp_path / "mixed" / "manifest.parquet").to_pylist()
    for row in rows:
        of = "started" if row["cohort"] % 2 == 0 else "guided"
        assert found[row["file"]] == images(tmp_path / of)[row["file"]]
        assert (row["started_from"] is None) == (row["energy_energy"] is not None) == (of == "guided")
        assert ("energy" in row["guidance"]) == (of == "guided")
    again = prepare(read_recipe(tmp_path / "mixed" / "recipe.yaml"), tmp_path / "mixed")
    assert len(again.done) == len(again.cohorts) == 6, "its recipe.yaml asks for the same"
    with pytest.raises(RequestError, match=r"mix\[0\]\.start\.depth: 0.5 there, 0.7 now"):
        prepare(mixed(digits_folder, mix=[{"share": 1, "start": {"depth": 0.7}}, MIX[1]]), tmp_path / "mixed")
    assert "50%: none, start from exemplars, depth 0.5 | 50%: energy" in plan_as_text(again)


def test_shares_are_kept_as_a_class_grows():
    for shares in ((1, 1), (3, 1), (0.2, 0.5, 0.3)):
        made = [0] * len(shares)
        for cohort in range(40):
            made[setting_of(cohort, shares)] += 1
            ideal = [share / sum(shares) * (cohort + 1) for share in shares]
            assert max(abs(a - b) for a, b in zip(made, ideal, strict=True)) <= 1


def test_a_mixture_that_cannot_be_is_refused(digits_folder: Path, tmp_path: Path):
    for changes, said in (
        ({"guidance": [ENERGY]}, "mix: 2: guidance is given outside mix too"),
        ({"cohort": 6}, "has 1 cohort, but mix has 2 settings"),
        ({"mix": MIX[:1]}, "mix: ["),
        ({"mix": MIX[:1]}, "it takes at least 2 entries. Add some."),
        ({"mix": [MIX[0], {"share": 0}]}, "mix[1].share: 0: it should be greater than 0. Choose a number in this range."),
        ({"exemplars": {}}, "mix[0].start"),
        ({"mix": [MIX[0], {"share": 1, "guidance": [{"method": "energy", "every": 9}]}]}, "mix[1].guidance[0].every: 9"),
        ({"mix": [MIX[0], {"share": 1, "guidance": [{"method": "energy", "features": "/no"}]}]}, "mix[1].guidance[0].features"),
    ):
        with pytest.raises(RequestError) as caught:
            prepare(mixed(digits_folder, **changes), tmp_path / "out")
        assert said in str(caught.value)
        assert "Tuple" not in str(caught.value)
        assert "Also" not in str(caught.value), "one fault is named once"
    with pytest.raises(RequestError, match="this command takes one setting at a time"):
        complete(mixed(digits_folder))

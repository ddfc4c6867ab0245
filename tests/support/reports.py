"""A run directory as reports show it: real digits, a baseline of the same noise, what was found about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from handful.data.images import write_png
from handful.generate import generate
from handful.judge.worth import KIND, worth
from handful.recipe.schema import recipe_from
from handful.runs.kept import FOLDER, keep
from handful.zoo.digits import load_digits_split

CLASSES = ("3", "5", "8")


def photos(root: Path, per_class: int = 14) -> Path:
    """Real digits, a folder per class."""
    split = load_digits_split()
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number, image in enumerate(split.train_images[split.train_labels == int(name)][:per_class]):
            write_png(root / name / f"{number:03d}.png", image)
    return root


def digits_run(out: Path, exemplars: Path | None, **more: Any) -> Path:
    """Twelve digits of each class in four steps."""
    asked: dict[str, Any] = {"model": {"name": "digits"}, "per_class": 12, "classes": list(CLASSES), "sampler": {"steps": 4}}
    if exemplars is not None:
        asked["exemplars"] = {"path": str(exemplars), "k": 4}
    generate(recipe_from({**asked, **more}), out)
    return out


def evaluation(gain: float = 0.1, baseline: str = "plain", folder: Path | None = None) -> dict[str, Any]:
    """What `handful evaluate` keeps, with made-up numbers."""
    scores = {"n_real": 30, "n_generated": 36, "precision": 0.9, "recall": 0.8, "density": 1.0, "coverage": 0.7, "f1": 0.788}
    scores |= {"frechet": 12.5, "vendi": 3.2, "vendi_real": 3.5, "note": ""}
    group = {"generated": scores, "ceiling": {**scores, "precision": 0.95, "coverage": 0.92}}
    nothing = {"interval": None, "verdict": None}
    ends = [gain - 0.02, gain + 0.02]
    f1 = {"value": 0.788, "baseline": 0.788 - gain, "gain": gain, "interval": ends, "surviving": 0.09, "verdict": "survives"}
    gains = {
        "f1": f1,
        "precision": {"value": 0.9, "baseline": 0.88, "gain": 0.02, **nothing},
        "coverage": {"value": 0.7, "baseline": 0.61, "gain": 0.09, **nothing},
    }
    flat = {name: scores[name] for name in ("precision", "recall", "density", "coverage", "f1", "frechet", "vendi")}
    after = {**flat, "precision": 0.85, "judge_accuracy": None}
    result = {**flat, "judge": "digits-judge", "judge_digest": "0", "judge_accuracy": 0.97, "copied": 0.125, "k": 5}
    result |= {"pooled": group, "per_class": dict.fromkeys(CLASSES, group), "transformed": {"jpeg": after, "noise": flat}}
    result["gains"] = {baseline: {"images": 36, "baseline_images": 36, "metrics": gains}}
    baselines = {baseline: str(folder)} if folder else {}
    return {"asked": {"real": "held-out", "judge": "digits-judge", "neighbours": 5, "baselines": baselines}, "result": result}


def reported_run(root: Path) -> Path:
    """A run beside a baseline, with an evaluation (made-up numbers) and what `handful utility` found."""
    out = digits_run(root / "out", photos(root / "photos"))
    plain = digits_run(root / "plain", None, guidance=[])
    keep(out, "evaluation", "a", evaluation(folder=plain))
    worth(out, seeds=1, steps=10)
    assert list((out / FOLDER).glob(f"{KIND}-*.json"))
    return out

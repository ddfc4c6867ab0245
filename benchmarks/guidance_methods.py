"""Off-the-shelf classifier guidance and its relatives, side by side in one sweep: the table of issue "EluCD" and its plots.

    python benchmarks/guidance_methods.py digits  --out /tmp/methods-digits  --seeds 0,1,2
    python benchmarks/guidance_methods.py cifar10 --out /tmp/methods-cifar10 --seeds 0

It writes the real images and OUT/request.yaml, and does what `handful sweep OUT/request.yaml --out OUT/sweep` does: an
interrupted benchmark goes on, and seeds, methods and scales can be added. digits: digits-guide guides, digits-judge (another
architecture) judges held-out digits. cifar10: resnet20 guides, resnet56 judges (../shared/models), on real test images.

Names of methods say what is changed of "classifier", plain classifier guidance by log p(y | x) at x0_hat through the gaussian
jacobian, on every third step with the direction held between: "softplus3" its ReLUs, "tau2-0" and "tau2-0.5" its second
temperature, "fitted" a temperature for each level of noise (from `handful calibrate`), "xt" that it looks at the noisy image,
"half" at half the resolution, "shifted" at shifted and noised copies, "exact" goes through the denoiser.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cifar10
import yaml

from handful.demo.digits import write_digits
from handful.report.tables import print_table
from handful.runs.progress import progress_for
from handful.sweep import prepare_sweep, read_sweep, run_sweep
from handful.sweep.printed import choice_table, results_table

Terms = list[dict[str, Any]]
STEPS_HELD = {"every": 3, "hold": True}
# From `handful calibrate`; docs/findings.md has the commands and the reasons.
CALIBRATED: dict[str, dict[str, Any]] = {"digits": {"softplus": 3.0}, "cifar10": {"softplus": 3.0}}


def digits(out: Path) -> dict[str, Any]:
    """The request on the packaged digits."""
    write_digits(out)
    chamfer = {"method": "chamfer", "features": "pixels", "jacobian": "gaussian", "every": 1}
    k = [2, 4, 8, 16, 32]
    return {
        "recipe": {"model": {"name": "digits"}, "exemplars": {"path": "real-train"}, "per_class": 64, "cohort": 64},
        "methods": {
            **methods("digits", "digits-guide", "digits-guide", (0.2, 0.1, 0.4), chamfer, (0.5, 1.0, 2.0), {}, k),
            "cvsg-pixels": {"guidance": [{**chamfer, "method": "cvsg", "scale": 0.2}], "k": k},
        },
        "k": [32],
        "real": "real-held-out",
        "judge": "digits-judge",
        "utility": {"steps": 200, "seeds": 1, "augment": False},
        "objective": "robust_frechet",
    }


def photographs(out: Path) -> dict[str, Any]:
    """The request on CIFAR-10."""
    cifar10.write_images("train", out / "real-train", 64)
    cifar10.write_images("test", out / "real-test", 200)
    cifar10.write_images("test", out / "real-test-400", 400)
    classes = {"classes": {name: label for label, name in enumerate(cifar10.CLASSES)}}
    chamfer = {"method": "chamfer", "features": "pixels", "scale": 0.2, "jacobian": "gaussian", "every": 1, "margin": 0.5}
    return {
        "recipe": {
            "model": {"name": str(cifar10.SHARED / "models/cifar10-unet"), "null_class": 10, "classes": cifar10.CLASSES},
            "exemplars": {"path": "real-train"},
            "per_class": 32,
            "cohort": 32,
        },
        "methods": {**methods("cifar10", cifar10.GUIDE, cifar10.GUIDE, (0.3, 0.2, 0.4), chamfer, (2.5, 4.0), classes, [32, 2])},
        "k": [32],
        "real": "real-test",
        "judge": cifar10.JUDGE,
        "utility": {"test": "real-test-400", "steps": 300, "seeds": 1, "flip": True},
        "objective": "robust_frechet",
    }


def methods(
    data: str,
    classifier: str,
    features: str,
    scales: tuple[float, ...],
    chamfer: dict[str, Any],
    cfg: tuple[float, ...],
    classes: dict[str, Any],
    k: list[int],
) -> dict[str, Any]:
    """What both data sets compare; of the classifier's scales the first where only one is tried, the last for "exact"."""
    plain = {
        "method": "classifier",
        "classifier": classifier,
        "jacobian": "gaussian",
        "scale": scales[0],
        **STEPS_HELD,
        **classes,
    }
    smooth = {**plain, "softplus": 3.0}
    best = {**plain, **CALIBRATED[data]}
    sparse = {"method": "cfg", "scale": 2 * cfg[0], "every": 2}
    views = {"samples": 1, "shift": 1 if data == "digits" else 2, "noise": 0.3}
    exact = {"jacobian": "exact", "scale": scales[2], "every": None, "hold": None}
    return {
        "none": {"guidance": []},
        "cfg": {"guidance": [{"method": "cfg"}], "scales": list(cfg)},
        "softplus3": {"guidance": [smooth], "scales": list(scales[:2])},
        "classifier": {"guidance": [plain]},
        "cfg+classifier": {"guidance": [sparse, best]},
        "chamfer-pixels": {"guidance": [chamfer], "k": k},
        "chamfer-pixels+classifier": {"guidance": [chamfer, best]},
        "chamfer-pixels+cfg+classifier": {"guidance": [chamfer, sparse, best]},
        "chamfer": {"guidance": [{"method": "chamfer", "features": features}], "k": k},
        "cvsg": {"guidance": [{"method": "cvsg", "features": features}], "k": k},
        "chamfer-pixels+cfg": {"guidance": [chamfer, sparse]},
        "softplus3+tau2-0": {"guidance": [{**smooth, "tau2": 0.0}]},
        "softplus3+xt": {"guidance": [{**smooth, "input": "x_t"}]},
        "softplus3+shifted": {"guidance": [{**smooth, "smoothing": views}]},
        "softplus3+exact": {"guidance": [{**smooth, **exact}]},
        "softplus3+sine": {"guidance": [{**smooth, "gain": "sine"}]},
        "softplus5": {"guidance": [{**plain, "softplus": 5.0}]},
        "softplus3+tau2-0.5": {"guidance": [{**smooth, "tau2": 0.5}]},
        "softplus3+half": {"guidance": [{**smooth, "reduce": 2}]},
        "cfg-every2": {"guidance": [sparse]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["digits", "cifar10"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--only", help="names of methods, with commas")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    request = {"digits": digits, "cifar10": photographs}[args.data](args.out)
    request["seeds"] = [int(seed) for seed in args.seeds.split(",")]
    (args.out / "request.yaml").write_text(yaml.safe_dump(request, sort_keys=False))
    asked = read_sweep(args.out / "request.yaml")
    job = prepare_sweep(asked, args.out / "sweep", only=args.only.split(",") if args.only else None)
    result = run_sweep(job, progress_for(False))
    choice = result.choice()
    print_table(results_table(result.rows, result.request, choice))
    print_table(choice_table(choice))
    for failure in result.failures:
        print(f"failed: {failure}")


if __name__ == "__main__":
    main()

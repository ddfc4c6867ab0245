"""What a sweep's rows hold: the columns by name, which way is better, and how tables call them."""

from __future__ import annotations

# What names a row.
KEYS = ("method", "scale", "k", "seed", "split", "images")
# What a judge finds of images as they are; a robust column is the mean over mild transforms of real and generated alike.
AS_IS = ("precision", "recall", "density", "coverage", "f1", "frechet", "vendi", "judge_accuracy")
ROBUST = ("robust_precision", "robust_recall", "robust_coverage", "robust_f1", "robust_frechet", "robust_judge_accuracy")
OTHERS = (
    "copied",
    "utility",
    "utility_spread",
    "seconds",
    "cost_ratio",
    "flops_ratio",
    "frechet_ratio",
    "robust_frechet_ratio",
)
# A gain over the baseline of the same seed: the difference, positive where it is better (as in `handful.judge.gains`).
GAINED = (
    "precision",
    "recall",
    "coverage",
    "f1",
    "frechet",
    "judge_accuracy",
    "robust_precision",
    "robust_recall",
    "robust_coverage",
    "robust_f1",
    "robust_frechet",
    "robust_judge_accuracy",
    "utility",
)
GAINS = tuple(f"gain_{name}" for name in GAINED)
NUMBERS = (*AS_IS, *ROBUST, *OTHERS, *GAINS)
LOWER_IS_BETTER = frozenset(
    (
        "frechet",
        "robust_frechet",
        "frechet_ratio",
        "robust_frechet_ratio",
        "copied",
        "utility_spread",
        "seconds",
        "cost_ratio",
        "flops_ratio",
    )
)
VALIDATION, TEST = "validation", "test"
SPLITS = (VALIDATION, TEST)

HEADINGS = {
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "f1": "F1",
    "frechet": "Frechet",
    "judge_accuracy": "acc.",
    "robust_precision": "rob.prec",
    "robust_recall": "rob.rec",
    "robust_coverage": "rob.cov",
    "robust_f1": "rob.F1",
    "robust_frechet": "rob.Frechet",
    "robust_judge_accuracy": "rob.acc",
    "copied": "copied",
    "utility": "utility",
    "cost_ratio": "x time",
    "flops_ratio": "x FLOPs",
}


def improvement(column: str, value: float, other: float) -> float:
    """How much better `value` is than `other`, in the column's own units; negative if it is worse."""
    return other - value if column in LOWER_IS_BETTER else value - other

"""What a job would do, in words and as data, for `--dry-run`."""

from __future__ import annotations

from typing import Any

from handful.errors import counted, some_of
from handful.generate.job import Job, megabytes
from handful.recipe.schema import Recipe


def plan_as_dict(job: Job) -> dict[str, Any]:
    """Plain data, for JSON."""
    done = [cohort for cohort in job.cohorts if cohort.key in job.done]
    return {
        "out": str(job.directory.path),
        "classes": {cohort.class_name: cohort.label for cohort in job.cohorts},
        "cohorts": len(job.cohorts),
        "cohorts_done": len(done),
        "images": job.images,
        "images_done": sum(cohort.count for cohort in done),
        "disk_bytes_needed": job.bytes_needed,
        "disk_bytes_free": job.directory.free_bytes(),
        "recipe": job.recipe.as_dict(),
        "notes": [*job.notes, *job.changes],
    }


def plan_as_text(job: Job) -> str:
    """Lines for people."""
    plan, recipe = plan_as_dict(job), job.recipe
    channels, height, width = job.image_shape
    names = list(plan["classes"])
    listed = some_of(names, 10)
    counts = job.exemplars.counts if job.exemplars else {}
    each = (
        f"{min(counts.values())} to {max(counts.values())}"
        if len(set(counts.values())) > 1
        else str(max(counts.values(), default=0))
    )
    alone = "" if job.exemplars is None or job.exemplars.images else ", as features alone"
    parts = [each.recipe for each in job.parts] or [recipe]
    guidance = [_terms(part) + (f", start {part.start.as_text()}" if part.start else "") for part in parts]
    if recipe.mix:
        total = sum(each.share for each in recipe.mix)
        guidance = [f"{each.share / total:.0%}: {text}" for each, text in zip(recipe.mix, guidance, strict=True)]
    steps = f"the last {job.levels.steps} of " * bool(job.inverted or recipe.start) + counted(recipe.sampler.steps, "step")
    lines = {
        "model": f"{recipe.model.name}, {height} x {width} x {channels}, {recipe.model.dtype} on {job.provenance['device']}",
        "exemplars": f"{recipe.exemplars.path}, {each} of each class{alone}" if counts else "none",
        "guidance": " | ".join(guidance),
        "sampler": f"{recipe.sampler.name}, {steps}, {recipe.sampler.spacing}",
        "classes": f"{len(names)}: {listed}",
        "cohorts": f"{plan['cohorts']} of up to {counted(recipe.cohort, 'image')}; done: {plan['cohorts_done']}",
        "images": f"{plan['images']}; done: {plan['images_done']}",
        "disk": f"up to {megabytes(plan['disk_bytes_needed'])} needed, {megabytes(plan['disk_bytes_free'])} free",
        "out": plan["out"],
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _terms(recipe: Recipe) -> str:
    told = ("embeddings", "classifier", "softplus", "scale", "exchange", "features", "jacobian", "every")
    terms = [
        ", ".join([term.method, *(f"{key} {value}" for key in told if (value := getattr(term, key, None)) is not None)])
        for term in recipe.guidance or ()
    ]
    return "; ".join(terms) or "none"

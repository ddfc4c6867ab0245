"""What the pipelines of Stable Diffusion 3 and Flux share: their scheduler's path, their text encoders, how they are loaded.

The shift by resolution is that of Esser et al. 2024 (arXiv 2403.03206), section 5.3.2, as diffusers has it: its logarithm mu
is linear in the number of image tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handful.core.noise import Flow
from handful.errors import RequestError, first_line
from handful.models.options import ModelOptions
from handful.models.pipelines import load_pipeline
from handful.models.prompts import Embeddings, Prompts, free_encoders, readers, runs_on
from handful.models.schedulers import from_flow
from handful.models.single_file import default_config, read_shapes
from handful.models.source import Source, find_source

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
UNUSED = ("image_encoder", "feature_extractor")  # parts of a pipeline that a prompt does not need


def scheduler_of(source: Source) -> Any:
    """The pipeline's scheduler, from its config."""
    told = source.scheduler()
    _refuse_kind(str(told.get("_class_name", SCHEDULER)))
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    try:
        return FlowMatchEulerDiscreteScheduler.from_config(told)
    except (TypeError, ValueError) as error:
        problem = f"no scheduler can be made from its config ({first_line(error)})"
        raise RequestError("model", source.name, problem, "Copy scheduler_config.json again: it is damaged.") from error


def flow_levels(scheduler: Any, tokens: int, *, time_scale: float, given_times: bool) -> Flow:
    """The levels of a flow-matching pipeline; by default its scheduler's own path.

    Args:
        scheduler: A `FlowMatchEulerDiscreteScheduler`; it stays as it is.
        tokens: Patches to an image, which the shift grows with where the scheduler shifts by resolution.
        time_scale: The time that the network takes, divided by s.
        given_times: Whether the pipeline gives the scheduler the times 1 ... 1 / steps (Flux), or lets it space them itself,
            from the largest to the smallest that it was trained on (Stable Diffusion 3).
    """
    _refuse_kind(type(scheduler).__name__)
    scheduler, config = copy.deepcopy(scheduler), scheduler.config
    shift, more = float(scheduler.shift), {}
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        shift, more = math.exp(mu) if config.time_shift_type == "exponential" else mu, {"mu": mu}

    def walked(steps: int) -> tuple[Tensor, Tensor]:
        times: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps)} if given_times else {"num_inference_steps": steps}
        scheduler.set_timesteps(**times, **more)
        return from_flow(scheduler.sigmas)

    levels = Flow(shift, time_scale)
    levels.with_own(walked)
    levels.spacings = ("model", *Flow.spacings)  # the two differ, and the pipeline's is what users compare with
    return levels


def pipeline_prompts(
    pipeline: Any, options: ModelOptions, encode: Callable[[list[str], torch.device], Embeddings], **most: int
) -> Prompts:
    """Prompts encoded by a pipeline; for no prompt by its encoding of the negative one. Freeing them takes its encoders away.

    Args:
        encode: Prompts, and the device that the encoders run on -> embeddings.
        most: Tokens that a tokenizer is cut at, by its name, where that is not its own maximum.
    """

    def here(prompts: list[str]) -> Embeddings:
        return encode(prompts, runs_on(pipeline.text_encoder))

    return Prompts(here, lambda: here([options.negative_prompt]), lambda: free_encoders(pipeline), readers(pipeline, **most))


def load_flow_pipeline(source: Source, options: ModelOptions, kind: str, transformer: str) -> Any:
    """`load_pipeline`; of a single file the transformer alone, and the rest from the pipeline that its configs are of."""
    if source.file is None:
        return load_pipeline(source, options, kind)
    import diffusers

    configs = configs_of(source, options, kind)
    try:
        network = getattr(diffusers, transformer).from_single_file(
            str(source.file), config=str(configs.folder or configs.name), subfolder="transformer", torch_dtype=options.dtype
        )
    except Exception as error:  # as in `load_pipeline`
        problem = f"no {transformer} can be read from it ({first_line(error)})"
        remedy = f"Check that config names the configs of this model (now {configs.name}), and copy the file again."
        raise RequestError("model", source.name, problem, remedy) from error
    return load_pipeline(configs, options, kind, transformer=network)


def configs_of(source: Source, options: ModelOptions, kind: str) -> Source:
    """Where the configs are: of a single file, where `options.config` says, or where diffusers takes them from.

    Raises:
        RequestError: If a single file's are not those of a pipeline of the class `kind`.
    """
    if source.file is None:
        return source
    name = options.config or default_config(read_shapes(source.file))
    found = find_source(name)
    if found is None or found.file is not None or (found.read_json("model_index.json") or {}).get("_class_name") != kind:
        problem = f"'{source.name}' is the transformer of a {kind}, and there is no such pipeline"
        raise RequestError("model.config", str(name), problem, "Give config: the pipeline's directory or hub name.")
    return replace(found, parts=source.parts)


def refuse_missing(name: str, pipeline: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Refuses a pipeline without a part that it needs."""
    absent = [part for part in needed if pipeline.get(part) in (None, [None, None])]
    if absent:
        raise RequestError("model", name, f"the pipeline has no {' and no '.join(absent)}", "Load it with all its parts.")


def refuse_channels(name: str, takes: int, latents: int) -> None:
    """Refuses a transformer that takes other channels than the latents have."""
    if takes != latents:
        problem = (
            f"its transformer takes {takes} channels and its latents have {latents}: it also needs an image, as inpainting "
            f"models do, or its parts come from different models"
        )
        raise RequestError("model", name, problem, "Use the family's model for text to image.")


def _refuse_kind(kind: str) -> None:
    if kind != SCHEDULER:
        problem = "this scheduler's levels are not known for this family"
        raise RequestError("model", kind, problem, f"Give the pipeline its own scheduler again: {SCHEDULER}.")

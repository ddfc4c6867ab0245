"""Any text-to-image pipeline of diffusers whose network is called with (latents, time, what prompts became).

Nothing of a family is written down here. The pipeline itself is run for two steps with stand-ins for its network and its
autoencoder, which compute nothing: so we hear how it calls them, which levels its scheduler walks, what it makes of the
network's answer, and what it decodes. Every fact is checked to be exactly one that `Denoiser` can follow; whatever else the
pipeline does (another rule of guidance, a second network, latents packed in another way) is refused, not guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from handful.core.denoiser import Condition, Prediction
from handful.core.noise import Flow, Schedule
from handful.errors import HandfulError, RequestError, first_line
from handful.models.latent import PATCH, LatentDenoiser, factor_of, packed, unpacked
from handful.models.options import ModelOptions, refuse_options
from handful.models.pipelines import load_pipeline, preview_decoder
from handful.models.prompts import (
    LENGTHS,
    Prompted,
    Prompts,
    free_encoders,
    readers,
    refuse_for_prompts,
    runs_on,
    text_encoders,
)
from handful.models.schedulers import from_flow, schedule_of
from handful.models.source import Source

NETWORKS = ("transformer", "unet")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
STEPS = 2  # of a trial run: enough to see what changes from step to step
TIMES = 500  # of the one that only hears the times
# What a pipeline's own call needs where it is no text-to-image pipeline.
OTHERS = {
    "num_frames": "makes videos",
    "audio_length_in_s": "makes sound",
    "audio_end_in_s": "makes sound",
    "duration": "makes sound",
    "image": "needs an image beside the prompt",
    "image_embeds": "needs an image's embedding",
    "image_embeddings": "needs an image's embedding",
}
TOKENS = ("Amused", "Meissonic", "VQDiffusion")  # words in the classes of pipelines that are no diffusion of numbers
PICTURES = (
    "Upscale",
    "Img2Img",
    "Inpaint",
    "Edit",
    "Pix2Pix",
    "Depth2Img",
    "ControlNet",
    "Adapter",
    "Fill",
    "Redux",
    "Control",
)


@dataclass
class _Heard:
    """One trial run.

    Attributes:
        calls: The arguments of each call of the network, by name.
        steps: What the scheduler was given: (model output, time, sample), and what it answered.
        encoded: What the pipeline's `encode_prompt` gave; None where it has none of that name.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)
    steps: list[tuple[Tensor, Any, Tensor, Tensor]] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)
    encoded: Any = None


@dataclass(frozen=True)
class Call:
    """How a network is called.

    Attributes:
        latents, time: Names of those arguments.
        clock: What `Schedule.time` gives, s of a flow or the training step -> the time argument; float32 (n,).
        sign: What its answer is multiplied by.
        packed: Whether it takes tokens of 2 x 2 latent pixels.
        constant: Its other arguments that no prompt decides, by name; "a.b" is the entry b of the dictionary a.
        listed: Those of them that are lists with an entry per image.
    """

    latents: str
    time: str
    clock: Callable[[Tensor], Tensor]
    sign: float
    packed: bool
    constant: Mapping[str, Any]
    listed: frozenset[str]


class PipelineDenoiser(Prompted, LatentDenoiser):
    """The network of a pipeline that was listened to, its autoencoder and its text encoders.

    Args:
        prediction, levels, resolution, preview_vae: As for `LatentDenoiser`.
        prompts: Gives the network's inputs for the prompts, by the names of its arguments.
    """

    def __init__(
        self,
        pipeline: Any,
        heard: Call,
        prediction: Prediction,
        levels: Schedule,
        resolution: tuple[int, int],
        prompts: Prompts,
        *,
        has_null: bool,
        preview_vae: Any = None,
    ) -> None:
        network, patch = getattr(pipeline, network_of(pipeline)), PATCH if heard.packed else 1
        super().__init__(network, pipeline.vae, prediction, levels, resolution, patch=patch, preview_vae=preview_vae)
        self.pipeline, self.prompts, self.heard, self._has_null = pipeline, prompts, heard, has_null

    @property
    def has_null(self) -> bool:
        return self._has_null

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        lengths = condition.embeddings.get(LENGTHS)
        if lengths is not None:  # not every network takes a mask of tokens: each length goes alone
            out = torch.empty_like(scaled)
            for length in lengths.unique().tolist():
                chosen = (lengths == length).to(scaled.device)
                told = {name: one[chosen] for name, one in condition.embeddings.items() if name != LENGTHS}
                told = {name: one[:, :length] if one.ndim > 1 and one.shape[1] > length else one for name, one in told.items()}
                out[chosen] = self.call(scaled[chosen], time[chosen], Condition(embeddings=told))
            return out
        heard, n = self.heard, len(scaled)
        told = {name: each.to(scaled) if each.is_floating_point() else each for name, each in condition.embeddings.items()}
        fixed: dict[str, Any] = {}
        for name, value in heard.constant.items():
            if isinstance(value, Tensor):  # positions stay in their own precision
                value = value.to(scaled.device)
            fixed[name] = value * n if name in heard.listed else value
        inside = packed(scaled) if heard.packed else scaled
        given = {heard.latents: inside, heard.time: heard.clock(time), "return_dict": False}
        out = heard.sign * self.network(**given, **_nested({**fixed, **told}))[0]
        return unpacked(out, *(side // PATCH for side in scaled.shape[-2:])) if heard.packed else out


def skeleton(source: Source, options: ModelOptions) -> PipelineDenoiser:
    """The loaded denoiser itself: how its network is called is heard of the pipeline, not of its configs."""
    return load(source, options)


def load(source: Source, options: ModelOptions) -> PipelineDenoiser:
    """Loads a pipeline's directory or hub name, and listens to it.

    Raises:
        RequestError: If it can't be loaded, or calls its network in another way.
    """
    kind = str((source.read_json("model_index.json") or {}).get("_class_name"))
    refuse_other_purposes(kind, source.name)
    return from_pipeline(load_pipeline(source, options, kind), options)


def refuse_other_purposes(kind: str, name: str) -> None:
    """Refuses a class of pipelines that makes something else than images of prompts."""
    import diffusers

    cls: Any = getattr(diffusers, kind, None)
    base = "Use the family's base model for text to image."
    if cls is None:
        raise RequestError(
            "model", name, f"it is a {kind}, which diffusers {diffusers.__version__} does not have", own_file(kind)
        )
    told = inspect.signature(cls.__call__).parameters
    for word, what in OTHERS.items():
        if word in told and (what.startswith("makes") or told[word].default is inspect.Parameter.empty):
            raise RequestError("model", name, f"it is a {kind}, which {what}", base)
    if word := next((word for word in PICTURES if word in kind), None):
        raise RequestError("model", name, f"it is a {kind}, which needs an image beside the prompt ({word})", base)
    if any(word in kind for word in TOKENS):
        problem = f"it is a {kind}, which predicts tokens: it has no noise levels, so guidance can't act on it"
        raise RequestError("model", name, problem, "Use a diffusion model of images or latents.")
    if "prompt" not in told:
        raise RequestError("model", name, f"it is a {kind}, an unknown family without a prompt", own_file(kind))


def own_file(kind: str) -> str:
    """What to do about a pipeline that can't be listened to: a file that would do, for its class."""
    return f"""A file of your own may return any Denoiser (docs/your-model.md); for this class it begins so:
  # mine.py, used by --model mine.py:model
  from diffusers import {kind}
  from handful.core.noise import Flow  # or VP, EDM: the levels that it was trained on
  from handful.core.denoiser import Condition, NetworkDenoiser
  class Mine(NetworkDenoiser):
      def condition(self, labels): return Condition(labels=None)  # what the network takes for each image
      def call(self, scaled, time, condition): return self.network(scaled, time, return_dict=False)[0]
      def decode(self, x0): return pipe.vae.decode(x0 / pipe.vae.config.scaling_factor, return_dict=False)[0]
  pipe = {kind}.from_pretrained("DIRECTORY")
  def model(): return Mine(pipe.transformer, "flow", (4, 64, 64), Flow())"""


def from_pipeline(pipeline: Any, options: ModelOptions) -> PipelineDenoiser:
    """A denoiser from any pipeline that can be listened to; it shares the pipeline's networks.

    Raises:
        RequestError: If it calls its network in another way than with latents, time and what prompts became.
    """
    refuse_for_prompts(options, UNUSED)
    kind = type(pipeline).__name__
    network = getattr(pipeline, network_of(pipeline))
    distilled = bool(getattr(network.config, "guidance_embeds", False))
    refuse_options(options, "trust_pickle", *(() if distilled else ("embedded_guidance",)))
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"guidance_scale": options.embedded_guidance if distilled else 1.0}
    if options.resolution is not None:
        asked |= {"height": options.resolution[0], "width": options.resolution[1]}
    one, two = (_listened(pipeline, ["a"] * n, STEPS, asked) for n in (1, 2))
    latents, time = _roles(kind, network, one)
    told, constant, listed = _arguments(kind, one, two, (latents, time))
    packed = one.calls[0][latents].ndim == 3
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    sign = _sign(kind, one)
    levels, prediction, clock = _levels(pipeline, kind, scheduler, one, time, asked)
    resolution = _resolution(pipeline, one)
    _check_input(kind, one, latents, prediction)
    call = Call(latents, time, clock, sign, packed, constant, listed)

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        heard = _listened(pipeline, prompts, 1, asked)
        flat = _flat(heard.calls[0])
        return {name: flat[name] for name in told}

    null = _null(pipeline, options, asked, told, _flat(one.calls[0]))
    prompts = Prompts(encode, (lambda: null) if null is not None else None, lambda: free_encoders(pipeline), readers(pipeline))
    denoiser = PipelineDenoiser(
        pipeline, call, prediction, levels, resolution, prompts, has_null=null is not None, preview_vae=preview_decoder(options)
    )
    _check_decoding(kind, denoiser, one)
    if "pag_scale" in inspect.signature(pipeline.__call__).parameters:
        denoiser.notes = (
            *denoiser.notes,
            "model: the pipeline's own perturbed-attention guidance is not used; only the "
            "guidance of the recipe acts (--guidance)",
        )
    return denoiser


def network_of(pipeline: Any) -> str:
    """The name of a pipeline's denoising network."""
    held = [name for name in NETWORKS if getattr(pipeline, name, None) is not None]
    more = [name for name in ("transformer_2", "unet_2", "decoder", "prior", "controlnet") if getattr(pipeline, name, None)]
    if len(held) != 1 or more or getattr(pipeline, "vae", None) is None:
        raise _strange(type(pipeline).__name__, f"its parts are {', '.join(pipeline.components)}: not one network and a vae")
    return held[0]


def _strange(kind: str, what: str) -> RequestError:
    return RequestError("model", kind, f"its network can't be used outside the pipeline: {what}", own_file(kind))


def _listened(
    pipeline: Any, prompts: list[str], steps: int, asked: Mapping[str, Any], encoded: Any = None, only: str | None = None
) -> _Heard:
    """A trial run of a pipeline, whose network answers noise at once.

    Args:
        encoded: What its `encode_prompt` gives instead of running text encoders.
        only: Keep of the calls this argument alone, as of a run of many steps.
    """
    kind = type(pipeline).__name__
    own = inspect.signature(pipeline.__call__).parameters
    words = {"prompt": prompts, "num_inference_steps": steps, "output_type": "pt", "use_resolution_binning": False}
    words |= {"clean_caption": False, "pag_scale": 0.0, "generator": torch.Generator().manual_seed(0), **asked}
    heard = _Heard(encoded=encoded)
    try:
        with _stand_ins(pipeline, heard, only), torch.no_grad():
            pipeline(**{name: value for name, value in words.items() if name in own})
    except HandfulError:
        raise
    except Exception as error:
        if "height" in asked and "divisible" in str(error):
            size = [asked["height"], asked["width"]]
            raise RequestError("model.resolution", size, first_line(error), "Use another.") from error
        raise _strange(kind, f"a trial run fails ({type(error).__name__}: {first_line(error)})") from error
    if only is None and (len(heard.calls) < steps or len(heard.steps) < steps or not heard.decoded):
        raise _strange(kind, "a trial run does not call network, scheduler and vae once a step")
    return heard


@contextmanager
def _stand_ins(pipeline: Any, heard: _Heard, only: str | None) -> Iterator[None]:
    """For the time of a trial run: a network that answers noise, a vae that answers black, a scheduler that is overheard."""
    network, scheduler, vae = getattr(pipeline, network_of(pipeline)), pipeline.scheduler, pipeline.vae
    signature, draw = inspect.signature(network.forward), torch.Generator().manual_seed(1)

    def forward(*args: Any, **kwargs: Any) -> Any:
        told = dict(signature.bind(*args, **kwargs).arguments)
        told |= told.pop("kwargs", {})
        x = next(iter(told.values()))
        if not isinstance(x, Tensor):
            raise ValueError(f"the network is called with a {type(x).__name__}, not with latents")
        shape, wide = list(x.shape), getattr(network.config, "out_channels", None)
        wide = wide or 2 * shape[1] * bool(getattr(network.config, "learn_sigma", False))
        if x.ndim == 4 and wide:
            shape[1] = max(wide, shape[1])
        out = torch.randn(shape, generator=draw).to(x)
        heard.calls.append(told if only is None else {only: told[only]})
        if only is None:
            heard.outs.append(out)
        return (out,) if told.get("return_dict") is False else SimpleNamespace(sample=out)

    step = scheduler.step

    def overheard(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        if only is None:
            heard.steps.append((model_output, timestep, sample, after))
        return result

    def decode(z: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        heard.decoded.append(z)
        images = torch.zeros(len(z), 3, *((1,) if z.ndim == 5 else ()), 8, 8, dtype=z.dtype, device=z.device)
        return SimpleNamespace(sample=images) if return_dict else (images,)

    encode = getattr(pipeline, "encode_prompt", None)

    def encoded(*args: Any, **kwargs: Any) -> Any:
        if heard.encoded is None and encode is not None:
            heard.encoded = encode(*args, **kwargs)
        return heard.encoded

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (network, "forward", forward),
        (scheduler, "step", overheard),
        (vae, "decode", decode),
        *([(pipeline, "encode_prompt", encoded)] if encode is not None else []),
    ]
    # diffusers takes the device of any part; the text encoders may be elsewhere by now than the others
    own = type(pipeline)
    encoders = text_encoders(pipeline)
    device = runs_on(next(iter(encoders.values()), network))
    pipeline.__class__ = type(own.__name__, (own,), {"_execution_device": device})
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in replaced]
    for owner, name, stand_in in replaced:
        owner.__dict__[name] = stand_in
    try:
        yield
    finally:
        pipeline.__class__ = own
        for owner, name, earlier in before:
            owner.__dict__.pop(name, None)
            if earlier is not None:
                owner.__dict__[name] = earlier


def _roles(kind: str, network: Any, heard: _Heard) -> tuple[str, str]:
    """The names of the network's arguments for latents and time."""
    told = heard.calls[0]
    latents = next(iter(told))
    names = [name for name in told if name in ("timestep", "timesteps", "t")]
    if len(names) != 1 or not isinstance(told[names[0]], Tensor):
        raise _strange(kind, f"{type(network).__name__} takes {', '.join(told)}, and none of these is the time")
    return latents, names[0]


def _flat(told: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; None and return_dict are left out."""
    flat: dict[str, Any] = {}
    for name, value in told.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{inside}{name}.")
        elif name != "return_dict":
            flat[inside + name] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = nested
        for each in path:
            place = place.setdefault(each, {})
        place[last] = value
    return nested


def _arguments(kind: str, one: _Heard, two: _Heard, roles: tuple[str, str]) -> tuple[list[str], dict[str, Any], frozenset[str]]:
    """Which of the network's arguments go with the images, which are constant, and which of those are a list per image."""
    first, second, double = (_flat(each) for each in (one.calls[0], one.calls[1], two.calls[0]))
    told, constant, listed = [], {}, set()
    for name, value in first.items():
        if name in roles:
            continue
        if not _same(value, second.get(name)):
            raise _strange(kind, f"the network's argument {name} changes from step to step")
        other = double.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim and len(other) == 2 * len(value):
            told.append(name)
            continue
        if isinstance(value, list) and isinstance(other, list) and len(other) == 2 * len(value) == 2:
            listed.add(name)
        elif not _same(value, other):
            raise _strange(kind, f"the network's argument {name} depends on how many images there are")
        constant[name] = value
    if not any(first[name].is_floating_point() and first[name].ndim >= 2 for name in told):
        raise _strange(kind, "the network does not get the prompt")
    return told, constant, frozenset(listed)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # such as the cosines and sines of positions
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b) if not isinstance(a, Tensor) else False


def _sign(kind: str, heard: _Heard) -> float:
    """What the pipeline multiplies the network's answer by before its scheduler sees it: 1 or -1."""
    for out, (given, *_) in zip(heard.outs, heard.steps, strict=False):
        answer = out[:, : given.shape[1]] if out.ndim == 4 else out  # a learned variance stands behind
        sign = next((s for s in (1.0, -1.0) if answer.shape == given.shape and _near(s * answer, given)), None)
        if sign is None:
            raise _strange(kind, "it changes the network's answer before the scheduler sees it")
    return sign  # type: ignore[return-value, possibly-undefined]  # there is a step


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-2 if a.dtype != torch.float32 else 1e-5, atol=1e-4)


def _check_input(kind: str, heard: _Heard, latents: str, prediction: str) -> None:
    """Refuses a network that is given something else than the sample, scaled at most."""
    for told, (_, _, sample, _) in zip(heard.calls, heard.steps, strict=False):
        x = told[latents].float()
        if x.shape != sample.shape:
            raise _strange(kind, f"the network gets {tuple(x.shape)} for latents of {tuple(sample.shape)}")
        factor = (x * sample).sum() / sample.float().square().sum()
        if not _near(x, factor * sample.float()) or (prediction == "flow" and abs(float(factor) - 1) > 1e-3):
            raise _strange(kind, "the network gets something else than the latents")


def _levels(
    pipeline: Any, kind: str, config: dict[str, Any], heard: _Heard, time: str, asked: Mapping[str, Any]
) -> tuple[Schedule, Prediction, Callable[[Tensor], Tensor]]:
    """The levels; what the network predicts; and how it takes the time."""
    levels, prediction = schedule_of(config)
    if prediction != "flow":
        times, given = _times(heard, time), [float(each[1]) for each in heard.steps]
        if any(abs(a - b) > 0.5 for a, b in zip(times, given, strict=False)):
            raise _strange(kind, f"the network gets the times {times} for the steps {given}")
        return levels, prediction, lambda t: t
    found: dict[int, Tensor] = {}

    def walked(steps: int) -> tuple[Tensor, Tensor]:
        if steps not in found:
            # the text encoders may be gone by then
            _listened(pipeline, ["a"], steps, asked, encoded=heard.encoded)
            found[steps] = pipeline.scheduler.sigmas.clone()
        path = found[steps].double()
        return from_flow(torch.cat([path[:steps], path.new_zeros(1)]))

    flow = Flow(getattr(levels, "shift", 1.0), 1.0)
    flow.with_own(walked)
    flow.spacings = ("model", *Flow.spacings)
    many = _listened(pipeline, ["a"], TIMES, asked, encoded=heard.encoded, only=time)
    return flow, prediction, clock_of(pipeline.scheduler.sigmas[:TIMES].double(), torch.tensor(_times(many, time)).double())


def clock_of(s: Tensor, told: Tensor) -> Callable[[Tensor], Tensor]:
    """How a network takes the times of a flow, from its inputs at many of them, (m,) each.

    It is exactly scale * s or scale * (1 - s); or that rounded down; or, where a pipeline shifts s but not the time argument,
    an interpolation of the recorded times.
    """
    for offset, scale in ((0, 1), (0, 1000), (1, -1), (1000, -1000)):
        if (offset + scale * s - told).abs().max() < 1e-5 * abs(scale):
            return lambda time: offset + scale * time
    if bool((told == told.floor()).all()) and (1000 * s - told).abs().max() < 1:
        return lambda time: (1000 * time + 1e-3).floor()  # float32 may lie just below
    places, answers = s.flip(0), told.flip(0)

    def interpolated(time: Tensor) -> Tensor:
        known, at = places.to(time), answers.to(time)
        above = torch.searchsorted(known, time).clamp(1, len(known) - 1)
        part = (time - known[above - 1]) / (known[above] - known[above - 1])
        return at[above - 1] + part * (at[above] - at[above - 1])

    return interpolated


def _times(heard: _Heard, time: str) -> list[float]:
    return [float(told[time].reshape(-1)[0]) for told in heard.calls]


def _resolution(pipeline: Any, heard: _Heard) -> tuple[int, int]:
    """(height, width) of the images, by what the autoencoder is given."""
    factor = factor_of(pipeline.vae.config)
    height, width = heard.decoded[0].shape[-2:]
    return height * factor, width * factor


def _null(
    pipeline: Any, options: ModelOptions, asked: Mapping[str, Any], told: list[str], plain: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """What the network takes as no prompt, recorded from the pipeline's own classifier-free guidance; None where it has "
    "none."""
    own = inspect.signature(pipeline.__call__).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in own else "guidance_scale"
    if scale not in own:
        return None
    words = {**asked, scale: 4.0, "negative_prompt": [options.negative_prompt], "true_cfg": True}
    with suppress(RequestError):
        heard = _listened(pipeline, ["a"], 1, words)
        calls = [_flat(each) for each in heard.calls]
        halves = [calls[0], calls[1]] if len(calls) > 1 else []
        if len(calls) == 1 and len(calls[0][told[0]]) == 2 * len(plain[told[0]]):
            halves = [{name: each[half : half + 1] for name, each in calls[0].items() if name in told} for half in (0, 1)]
        if halves:
            far = [max(_distance(half[name], plain[name]) for name in told) for half in halves]
            if max(far) > 0:
                chosen = halves[far.index(max(far))]
                return {name: chosen[name].detach().cpu() for name in told}
            return {name: plain[name].detach().cpu() for name in told}  # the prompt of the trial run is the negative one
    if options.negative_prompt:
        problem = "this pipeline has no negative prompt"
        raise RequestError("model.negative_prompt", options.negative_prompt, problem, "Leave it out.")
    return None


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape[2:] != b.shape[2:]:
        return float("inf")
    length = min(a.shape[1], b.shape[1]) if a.ndim > 1 else 1
    a, b = (each[:, :length] if each.ndim > 1 else each for each in (a, b))
    return float((a.double() - b.double()).abs().max()) + abs(a.shape[-1] - b.shape[-1])


def _check_decoding(kind: str, denoiser: PipelineDenoiser, heard: _Heard) -> None:
    """Refuses a pipeline that makes something else of its last latents than `LatentDenoiser.decode` gives the autoencoder."""
    last, given = heard.steps[-1][3], heard.decoded[0]
    if denoiser.heard.packed:
        last = unpacked(last, *(side // PATCH for side in denoiser.shape[1:]))
    given = given.squeeze(2) if given.ndim == 5 else given
    ours = denoiser.scaled_for_vae(last)
    if ours.shape != given.shape or not _near(ours.to(given), given):
        raise _strange(kind, "it scales or packs its latents for the vae in a way that is not known here")

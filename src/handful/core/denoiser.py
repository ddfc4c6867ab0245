"""The one idea: every pretrained network is a denoiser, E[x0 | x_t].

`Denoiser` is what samplers and guidance know. `NetworkDenoiser` turns any network into one by the table below;
n = sqrt(alpha^2 + sigma^2), m = alpha + sigma. No other file converts between parametrizations.

    predicts  input    x0_hat                            sources
    eps       x_t / n  x_t / alpha - (sigma / alpha) out  Ho et al. 2020
    v         x_t / n  (alpha / n^2) x_t - (sigma / n) out  Salimans & Ho 2022, appendix D
    x0        x_t / n  out
    flow      x_t / m  x_t / m - (sigma / m) out          v = eps - x0; Liu et al. 2022, Esser et al. 2024
    edm       x_t / alpha  out                            Karras et al. 2022, equation 7
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from handful.core.noise import Level, Levels, Schedule
from handful.errors import RequestError

Prediction = Literal["eps", "v", "x0", "flow", "edm"]


class Perturbation(Protocol):
    """A change of a network's own embedding of n labels; see `Condition`."""

    def __call__(self, embedding: Tensor) -> Tensor:
        """(n, ...) -> the embedding that the network then uses; the same shape, dtype and device, differentiable."""
        ...

    def __getitem__(self, part: slice) -> Perturbation:
        """The same for some of the images."""
        ...


@dataclass(frozen=True)
class Condition:
    """The condition of n images: labels, or embeddings of prompts.

    Attributes:
        labels: int64, shape (n,); None where the network takes none.
        null_label: The label that stands for "no class", where the network has one.
        embeddings: For a network that takes prompts, their embeddings by name, (n, ...) each; empty for other networks.
        null_embeddings: The same for no prompt, (1, ...) each; None where there is no such thing.
        perturbation: Changes the network's embedding of the labels (see `Denoiser.label_embeddings`); None: no change.
        nothing: Whether this is a null condition, which nothing perturbs.
    """

    labels: Tensor | None = None
    null_label: int | None = None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    null_embeddings: Mapping[str, Tensor] | None = None
    perturbation: Perturbation | None = None
    nothing: bool = False

    def null(self) -> Condition:
        """The null condition ("no class", or no prompt), of the same length.

        Raises:
            RequestError: If the network has no null condition.
        """
        if self.embeddings and self.null_embeddings is not None:
            n = len(next(iter(self.embeddings.values())))
            null = {name: one.expand(n, *one.shape[1:]) for name, one in self.null_embeddings.items()}
            return replace(self, embeddings=null, nothing=True)
        if self.labels is None or self.null_label is None:
            remedy = "Use another guidance (chamfer needs none), or name the null class's label with --null-class."
            raise RequestError("guidance", "cfg", "this model has no null class, which this guidance needs", remedy)
        return replace(self, labels=torch.full_like(self.labels, self.null_label), perturbation=None, nothing=True)

    def __getitem__(self, part: slice) -> Condition:
        return replace(
            self,
            labels=None if self.labels is None else self.labels[part],
            embeddings={name: all_[part] for name, all_ in self.embeddings.items()},
            perturbation=None if self.perturbation is None else self.perturbation[part],
        )


class Denoiser(nn.Module):
    """E[x0 | x_t]: a pretrained network, or a guided one.

    Attributes:
        shape: (c, h, w) of one x0 (pixels, or latents).
        levels: The schedule that the network was trained on.
        classes: Names of the classes it knows, by label; empty where it has none or they are unknown.
        label_count: Labels that it takes, the null class included; 0 where it takes none.
        null_class: The label for "no class"; None where there is none.
        prompted: Whether it takes prompts: `condition` then takes texts.
        learned_variance: Where the network learned the variance of the reverse step: what it said of it at the last
            evaluation, in [-1, 1], the shape of x_t (Nichol & Dhariwal 2021, equation 15, as 2 v - 1); else None.
        code_sha256: Of the user's file that made it; None where no such code did.
        notes: What was concluded while it was loaded, in words for the user.
        null_may_be_unstated: Whether one of its labels may be the null class though nothing states it.
    """

    shape: tuple[int, int, int]
    levels: Schedule
    classes: Sequence[str] = ()
    label_count: int = 0
    null_class: int | None = None
    prompted: bool = False
    learned_variance: Tensor | None = None
    code_sha256: str | None = None
    notes: Sequence[str] = ()
    null_may_be_unstated: bool = False

    @abstractmethod
    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        """Estimates the clean image.

        Args:
            x_t: (n, c, h, w), the noisy images or latents.
            level: How noisy they are; one for all or one each.
            condition: n conditions.

        Returns:
            x0_hat, the shape and dtype of x_t; differentiable.
        """

    @abstractmethod
    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        """Makes the condition for n labels, or for n prompts where the network takes prompts."""

    def check_path(self, levels: Levels) -> None:
        """Refuses a path on which it can't be evaluated.

        Raises:
            RequestError: Naming the spacing.
        """

    def enter(self, x: Tensor, levels: Levels, index: int, condition: Condition) -> Tensor:
        """The sample x (n, c, h, w) as guidance changes it before step `index` of a path is evaluated; samplers call it."""
        return x

    def leave(self, x: Tensor, levels: Levels, index: int, share: Tensor | float = 0.0) -> Tensor:
        """What guidance makes of the sample x (n, c, h, w) that step `index` arrived at; samplers call it.

        Args:
            share: How far the variance of the noise that an ancestral step added lies from the posterior's (0) to the forward
                step's (1), on a logarithmic scale; one, or one for each number of x.
        """
        return x

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one decoded image."""
        return self.shape

    @property
    def pixels(self) -> bool:
        """Whether x0 are images themselves, in [-1, 1], not latents."""
        return type(self).decode is Denoiser.decode

    def decode(self, x0: Tensor) -> Tensor:
        """x0 -> images (n, c, h, w) in [-1, 1]; differentiable. Pixel models: the identity."""
        return x0

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] -> x0."""
        return images

    def preview(self, x0: Tensor, reduce: int = 1) -> Tensor:
        """What guidance looks at: `decode`, at 1/reduce of the resolution and so at about 1/reduce^2 of its cost.

        Pixels are averaged. Latents are averaged before they are decoded, which is near to the decoded average but not it.
        """
        return self.decode(shrunk(x0, reduce))

    @property
    def preview_factor(self) -> int:
        """The `reduce` at which a preview costs least; 1 where it costs nothing anyway."""
        return 1

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition, which classifier-free guidance needs."""
        return self.prompted or self.null_class is not None

    @property
    def learns_variance(self) -> bool:
        """Whether an evaluation sets `learned_variance`."""
        return False

    @property
    def label_embeddings(self) -> Sequence[nn.Module]:
        """The modules that embed its labels, whose outputs a condition's perturbation changes; empty where none is known."""
        return ()

    def place(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Moves the networks to a device and a precision."""
        self.to(device, dtype)

    def components(self) -> Mapping[str, nn.Module]:
        """The networks whose weights decide the images, by name."""
        return {"": self}


def shrunk(images: Tensor, reduce: int) -> Tensor:
    """Averages squares of reduce x reduce: (n, c, h, w) -> (n, c, h / reduce, w / reduce); differentiable."""
    return images if reduce == 1 else avg_pool2d(images, reduce)


def network_input(prediction: Prediction, x_t: Tensor, level: Level) -> Tensor:
    """Scales x_t (n, c, h, w) as the network saw it in training: the second column of the table."""
    alpha, sigma = level.on(x_t)
    if prediction == "edm":
        return x_t / alpha
    if prediction == "flow":
        return x_t / (alpha + sigma)
    return x_t / torch.hypot(alpha, sigma)


def denoised_from(prediction: Prediction, x_t: Tensor, out: Tensor, level: Level) -> Tensor:
    """Turns the network's output into x0_hat: the third column. All tensors (n, c, h, w)."""
    alpha, sigma = level.on(x_t)
    if prediction == "eps":
        return (x_t - sigma * out) / alpha
    if prediction == "v":
        n = torch.hypot(alpha, sigma)
        return (alpha / n**2) * x_t - (sigma / n) * out
    if prediction == "flow":
        return (x_t - sigma * out) / (alpha + sigma)
    return out  # x0 and edm networks give it themselves


def output_from(prediction: Prediction, x_t: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
    """Turns x0_hat back into the network's output: the third column, solved for it. All tensors (n, c, h, w)."""
    alpha, sigma = level.on(x_t)
    if prediction == "eps":
        return (x_t - alpha * x0_hat) / sigma
    if prediction == "v":
        n = torch.hypot(alpha, sigma)
        return ((alpha / n) * x_t - n * x0_hat) / sigma
    if prediction == "flow":
        return (x_t - (alpha + sigma) * x0_hat) / sigma
    return x0_hat


class NetworkDenoiser(Denoiser):
    """A denoiser from a network and what it predicts. Subclasses say how the network is called.

    The network's weights are frozen, and it runs in its own precision; x_t and x0_hat keep the caller's.

    Attributes:
        offloaded_to: The device that the weights come to only while they are needed; None where they stay.
    """

    offloaded_to: torch.device | None = None

    def __init__(self, network: nn.Module, prediction: Prediction, shape: tuple[int, int, int], levels: Schedule) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise RequestError(
                "prediction", prediction, "no such prediction is known", f"Choose one of: {', '.join(get_args(Prediction))}."
            )
        self.network = network.eval().requires_grad_(False)
        self.prediction: Prediction = prediction
        self.shape, self.levels = shape, levels

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.offloaded_to or next(self.network.parameters(), torch.empty(0)).device

    def check_path(self, levels: Levels) -> None:
        if self.prediction == "eps" and levels.alpha[0] == 0:
            remedy = "Use sampler.spacing leading or logsnr, which begin below pure noise; or a model that predicts v."
            if "logsnr" not in self.levels.spacings:
                remedy = "Use a model that predicts v or the flow."
            problem = "the path begins at pure noise (alpha 0), where predicted noise says nothing of the image"
            raise RequestError("sampler.spacing", None, problem, remedy)

    @property
    def learns_variance(self) -> bool:
        return getattr(getattr(self.network, "config", None), "out_channels", None) == 2 * self.shape[0]

    @abstractmethod
    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Calls the network: scaled (n, c, h, w) in its precision, time (n,) float32 -> its output.

        (n, c, h, w), or (n, 2 c, h, w) with what it learned of the variance behind.
        """

    def perturbed_call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """`call`, with the embeddings of the labels changed as the condition's perturbation says."""
        change = condition.perturbation
        if change is None:
            return self.call(scaled, time, condition)

        def changed(_module: nn.Module, _given: object, embedding: Tensor) -> Tensor:
            return change(embedding)

        hooks = [module.register_forward_hook(changed) for module in self.label_embeddings]
        try:
            return self.call(scaled, time, condition)
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        scaled = network_input(self.prediction, x_t, level)
        time = self.levels.time(level).to(x_t.device, torch.float32).expand(len(x_t))
        parameter = next(self.network.parameters(), x_t)
        out = self.perturbed_call(scaled.to(parameter.dtype), time, condition).to(x_t.dtype)
        if out.shape[1] == 2 * x_t.shape[1]:
            out, learned = out.chunk(2, dim=1)
            self.learned_variance = learned.detach()
        return denoised_from(self.prediction, x_t, out, level)


class Around(Denoiser):
    """A denoiser around another one, which is asked for all that a subclass does not answer itself."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape, self.levels, self.classes = denoiser.shape, denoiser.levels, denoiser.classes
        self.label_count, self.null_class, self.prompted = denoiser.label_count, denoiser.null_class, denoiser.prompted
        self.notes, self.null_may_be_unstated = denoiser.notes, denoiser.null_may_be_unstated

    def check_path(self, levels: Levels) -> None:
        self.denoiser.check_path(levels)

    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        return self.denoiser.condition(labels)

    def enter(self, x: Tensor, levels: Levels, index: int, condition: Condition) -> Tensor:
        return self.denoiser.enter(x, levels, index, condition)

    def leave(self, x: Tensor, levels: Levels, index: int, share: Tensor | float = 0.0) -> Tensor:
        return self.denoiser.leave(x, levels, index, share)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.denoiser.image_shape

    @property
    def pixels(self) -> bool:
        return self.denoiser.pixels

    @property
    def preview_factor(self) -> int:
        return self.denoiser.preview_factor

    @property
    def learns_variance(self) -> bool:
        return self.denoiser.learns_variance

    @property
    def label_embeddings(self) -> Sequence[nn.Module]:
        return self.denoiser.label_embeddings

    def preview(self, x0: Tensor, reduce: int = 1) -> Tensor:
        return self.denoiser.preview(x0, reduce)

    def decode(self, x0: Tensor) -> Tensor:
        return self.denoiser.decode(x0)

    def encode(self, images: Tensor) -> Tensor:
        return self.denoiser.encode(images)


class Clamped(Around):
    """A pixel denoiser whose estimate is kept inside the images' range [-1, 1].

    Outermost: guidance lies inside, so that the clamp follows the shift and zeroes no gradient. Without it a strong shift
    pushes pixels out of range, and every later step starts from an image that the network never saw.
    """

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        x0_hat = self.denoiser(x_t, level, condition).clamp(-1, 1)
        self.learned_variance = self.denoiser.learned_variance
        return x0_hat

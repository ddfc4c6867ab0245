"""The seam: a denoiser and guidance terms make a denoiser again. The only place where terms meet autograd.

Each potential U of the decoded images gives its gradient with respect to the images; the gradients are weighted, added, and
pulled back once through decoder and denoiser. So however many potentials there are, a step decodes once and goes back once.

A cohort too large for memory is guided exactly all the same, in chunks: features of all chunks without a graph, the set
energy's gradient with respect to the features, then each chunk again with its graph (gradient caching: Gao et al. 2021,
arXiv 2101.06983). That costs one more forward pass; the result is the same but for rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from handful.denoiser import Condition, Denoiser
from handful.errors import RunError
from handful.guidance.base import Guidance, Potential, Pull, Step, Timing, in_chunks
from handful.noise import Level

Turn = tuple[Pull, Timing]  # potentials that go back together, and whose direction is held together


class Guided(Denoiser):
    """A guided denoiser.

    With no active term it returns the denoiser's own output, to the bit. Where x_t carries a graph of the caller's, the
    output is differentiable through x0_hat, with the shift as a constant.

    Args:
        denoiser: Any denoiser, a guided one too.
        terms: Guidance terms; their shifts add up.
        chunk: At most so many images at once through the networks; None takes the whole cohort and halves it for as
            long as the device is out of memory. A guided denoiser inside takes whole cohorts: chunk it, not this.
    """

    def __init__(self, denoiser: Denoiser, terms: Sequence[Guidance], chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {chunk}")
        if chunk is not None and isinstance(denoiser, Guided):
            raise ValueError("chunk: the guided denoiser inside couples its cohort; give the chunk to that one")
        self.denoiser, self.terms, self.chunk = denoiser, tuple(terms), chunk
        self.shape, self.levels, self.classes = denoiser.shape, denoiser.levels, denoiser.classes
        self.label_count, self.null_class, self.prompted = denoiser.label_count, denoiser.null_class, denoiser.prompted
        self._held: dict[Turn, Tensor] = {}

    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        return self.denoiser.condition(labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.denoiser.image_shape

    @property
    def preview_factor(self) -> int:
        return self.denoiser.preview_factor

    @property
    def learns_variance(self) -> bool:
        return self.denoiser.learns_variance

    def preview(self, x0: Tensor, reduce: int = 1) -> Tensor:
        return self.denoiser.preview(x0, reduce)

    def decode(self, x0: Tensor) -> Tensor:
        return self.denoiser.decode(x0)

    def encode(self, images: Tensor) -> Tensor:
        return self.denoiser.encode(images)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        x0_hat, shift = self.parts(x_t, level, condition)
        return x0_hat if shift is None else x0_hat + shift

    def parts(self, x_t: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The unguided x0_hat and the shift that guidance adds to it, apart; None where no term acts."""
        while True:
            try:
                return self._parts(x_t, level, condition)
            except torch.OutOfMemoryError:
                now = min(self.chunk or len(x_t), len(x_t))
                if now == 1 or isinstance(self.denoiser, Guided):
                    raise
                self.chunk = (now + 1) // 2
                warnings.warn(f"out of memory with {now} images at once; going on with {self.chunk}", stacklevel=2)

    def _parts(self, x_t: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Tensor | None]:
        if not level.index:
            self._held.clear()  # off a path, or at the start of one: nothing to go on from
            for term in self.terms:
                term.begin()
        active = [term for term in self.terms if term.strength(level) > 0]
        due: dict[Turn, list[Potential]] = {}
        for term in active:
            if isinstance(term, Potential):  # directions that are held end with their own timing
                due.setdefault((term.pull, term.timing if term.pull.hold else Timing()), []).append(term)
        shifts = [-_radius(level) * direction for turn, direction in self._held.items()
                  if turn not in due and turn[1].covers(level)]  # fmt: skip
        if not active and not shifts:
            return self._plain(x_t, level, condition), None
        if level.alpha.ndim:
            raise ValueError(f"level: guidance acts at one level for the whole cohort, not at {len(level.alpha)}; "
                             "guide images of other levels apart")  # fmt: skip

        outside = torch.is_grad_enabled() and x_t.requires_grad
        backward = any(pull.jacobian == "exact" for pull, _ in due)
        whole = self.chunk is None or len(x_t) <= self.chunk  # then one graph serves forward and backward
        x = x_t if outside else x_t.detach().requires_grad_(backward)
        with torch.set_grad_enabled(outside or (backward and whole)):
            x0_hat = self._plain(x, level, condition)
        with torch.no_grad():
            step = Step(self.denoiser, x_t.detach(), level, condition, x0_hat.detach(), self.chunk)
            shifts += [term.shift(step) for term in active if not isinstance(term, Potential)]
        if due:
            estimate = x0_hat if x0_hat.requires_grad else x0_hat.detach().requires_grad_()
        views: dict[int, Tensor] = {}  # what potentials look at, by its reduction
        for (pull, timing), terms in due.items():
            if pull.reduce not in views:
                with torch.set_grad_enabled(whole):
                    views[pull.reduce] = self._preview(estimate, pull.reduce)
            images = views[pull.reduce]
            cotangent, weight = self._image_cotangent(terms, pull, images.detach(), level)
            if whole:
                of = x if pull.jacobian == "exact" else estimate
                (gradient,) = torch.autograd.grad(images, of, cotangent, retain_graph=outside or len(due) > 1)
            else:
                gradient = self._replayed_gradient(pull, step, cotangent)
            if not gradient.isfinite().all():
                names = " and ".join(term.name for term in terms)
                raise RunError(f"guidance {names}: the gradient is not finite at sigma / alpha = {level.ratio:.4g}; "
                               "the model's or the extractor's output overflows: use float32, or a smaller scale")  # fmt: skip
            if pull.normalize == "none":
                shifts.append(-_absolute_factor(pull, level) * gradient)
                continue
            direction = weight * _unit(gradient, terms)
            if pull.hold:
                self._held[pull, timing] = direction
            shifts.append(-_radius(level) * direction)
        return x0_hat if outside else x0_hat.detach(), torch.stack(shifts).sum(0)

    def _plain(self, x: Tensor, level: Level, condition: Condition) -> Tensor:
        """x0_hat under the condition; what the network learned of the variance is kept of this evaluation alone."""
        learned: list[Tensor] = []

        def estimate(part: slice) -> Tensor:
            x0_hat = self.denoiser(x[part], level, condition[part])
            if self.denoiser.learned_variance is not None:
                learned.append(self.denoiser.learned_variance)
            return x0_hat

        x0_hat = self._chunked(estimate, len(x))
        self.learned_variance = torch.cat(learned) if learned else None
        return x0_hat

    def _preview(self, x0_hat: Tensor, reduce: int) -> Tensor:
        return self._chunked(lambda part: self.denoiser.preview(x0_hat[part], reduce), len(x0_hat))

    def _chunked(self, call: Callable[[slice], Tensor], n: int) -> Tensor:
        return in_chunks(call, n, self.chunk)

    def _image_cotangent(self, terms: list[Potential], pull: Pull, images: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The terms' weighted gradients with respect to the images, added; and that sum's rms.

        For one term normalised by rms this is `strength * g / rms(g)` and the strength; several keep their proportions,
        and cancel where they disagree.
        """
        total = torch.zeros_like(images)
        for term in terms:
            gradient = self._image_gradient(term, images)
            if pull.normalize != "none":
                gradient = _unit(gradient, [term])
            total = total + term.strength(level) * gradient
        return total, _rms(total, terms)

    def _image_gradient(self, term: Potential, images: Tensor) -> Tensor:
        """dU / d images (n, c, h, w), chunk by chunk through the extractor."""
        leaf = images.detach().requires_grad_()
        whole = self.chunk is None or len(images) <= self.chunk
        with torch.set_grad_enabled(whole):
            features = self._chunked(lambda part: term.extractor(leaf[part]), len(leaf))
        with torch.enable_grad():
            given = features if whole else features.detach().requires_grad_()
            energy = term.energy(given).sum()
            if whole:
                return torch.autograd.grad(energy, leaf)[0]
            (cotangent,) = torch.autograd.grad(energy, given)
        return self._replayed(lambda image, part: term.extractor(image), images, cotangent)

    def _replayed_gradient(self, pull: Pull, step: Step, cotangent: Tensor) -> Tensor:
        """The images' cotangent pulled back to x_t, or only to x0_hat, with a graph of one chunk at a time."""
        preview, denoiser = self.denoiser.preview, self.denoiser
        if pull.jacobian != "exact":
            return self._replayed(lambda x0, part: preview(x0, pull.reduce), step.x0_hat, cotangent)
        return self._replayed(lambda x, part: preview(denoiser(x, step.level, step.condition[part]), pull.reduce),
                              step.x_t, cotangent)  # fmt: skip

    def _replayed(self, call: Callable[[Tensor, slice], Tensor], at: Tensor, cotangent: Tensor) -> Tensor:
        """The vector-Jacobian product of `call` at `at`, chunk by chunk."""

        def product(part: slice) -> Tensor:
            leaf = at[part].detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(call(leaf, part), leaf, cotangent[part])[0]

        return self._chunked(product, len(at))


def _rms(gradient: Tensor, terms: Sequence[Potential]) -> Tensor:
    """Root mean square (1 or n, 1, 1, 1): over the cohort if any term couples its images, so that covering and
    non-covering images keep their ratio; else, or if asked, over each image."""
    over = (0, 1, 2, 3) if any(t.per == "set" and t.pull.normalize != "rms-image" for t in terms) else (1, 2, 3)
    peak = gradient.abs().amax(over, keepdim=True)  # taken out, because the square of a small gradient underflows
    return peak * (gradient / peak.where(peak > 0, 1)).square().mean(over, keepdim=True).sqrt()


def _unit(gradient: Tensor, terms: Sequence[Potential]) -> Tensor:
    """The gradient over its rms; 0 where it is 0."""
    rms = _rms(gradient, terms)
    return gradient / rms.where(rms > 0, 1)


def _radius(level: Level) -> float:
    """r = sigma / n: how far x0_hat of unit-variance data is off, in standard deviations."""
    return float(level.sigma / level.total)


def _absolute_factor(pull: Pull, level: Level) -> float:
    """What multiplies an unnormalised gradient; at alpha = 0 x_t says nothing of the image, and no potential acts."""
    if pull.jacobian == "gaussian":
        return _radius(level) ** 2
    return float(level.sigma**2 / level.alpha) if level.alpha > 0 else 0.0

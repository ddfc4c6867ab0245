"""The seam: a denoiser and guidance terms make a denoiser again. The only place where terms meet autograd.

Each potential U of the decoded images gives its gradient with respect to the images; the gradients are weighted, added, and
pulled back once through decoder and denoiser. So however many potentials there are, a step decodes once and goes back once.

A cohort too large for memory is guided exactly all the same, in chunks: features of all chunks without a graph, the set
energy's gradient with respect to the features, then each chunk again with its graph (gradient caching: Gao et al. 2021,
arXiv 2101.06983). That costs one more forward pass; the result is the same but for rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from handful.core.denoiser import Around, Condition, Denoiser
from handful.core.memory import in_smaller_parts
from handful.core.noise import Level, Levels, posterior_deviation
from handful.core.ranges import any_range
from handful.errors import RequestError, RunError, counted
from handful.guidance.base import Guidance, Potential, Pull, Step, Timing, in_chunks

Turn = tuple[Pull, Timing]  # potentials that go back together; where directions are held, or the rule asks, with one timing
Result = TypeVar("Result")


class Guided(Around):
    """A guided denoiser.

    With no active term it returns the denoiser's own output, to the bit. Where x_t carries a graph of the caller's, the
    output is differentiable through x0_hat, with the shift as a constant.

    Args:
        denoiser: Any denoiser, a guided one too.
        terms: Guidance terms; their shifts add up.
        chunk: At most this many images at once through the networks; None takes the whole cohort and halves it for as
            long as the device is out of memory. A guided denoiser inside takes whole cohorts: chunk it, not this.
    """

    def __init__(self, denoiser: Denoiser, terms: Sequence[Guidance], chunk: int | None = None) -> None:
        super().__init__(denoiser)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {chunk}")
        if chunk is not None and isinstance(denoiser, Guided):
            raise ValueError("chunk: the guided denoiser inside needs its whole cohort at once; set chunk on that one")
        self.terms, self.chunk = tuple(terms), chunk
        self._held: dict[Turn, Tensor] = {}
        self._moves: dict[int, list[tuple[Turn, Tensor]]] = {}  # by a step's index: what its end does to the sample

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        x0_hat, shift = self.parts(x_t, level, condition)
        return x0_hat if shift is None else x0_hat + shift

    def parts(self, x_t: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The unguided x0_hat and the shift that guidance adds to it, apart; None where no term acts on it."""
        return self._retrying(len(x_t), lambda: self._parts(x_t, level, condition))

    def enter(self, x: Tensor, levels: Levels, index: int, condition: Condition) -> Tensor:
        return self.moved_before(self.denoiser.enter(x, levels, index, condition), levels[index], condition)

    def moved_before(self, x: Tensor, level: Level, condition: Condition) -> Tensor:
        """The sample x_t as potentials with the rule "before" want a step to start from; x itself without such."""
        due = _by_turn(term for term in self._potentials(level) if term.pull.rule == "before")
        for turn, terms in due.items():
            _refuse_many_levels(level)
            point = _Point(x.detach(), x.detach(), level, condition)
            gradient, weight = self._retrying(len(x), partial(self._pulled, terms, turn[0], point))
            x = x + float(level.alpha) * _shift(turn[0], terms, gradient, weight, x, level)
        return x

    def leave(self, x: Tensor, levels: Levels, index: int, share: Tensor | float = 0.0) -> Tensor:
        x = self.denoiser.leave(x, levels, index, share)
        for (pull, timing), move in self._moves.pop(index, ()):
            if pull.rule == "held":
                x = x + float(levels[index + 1].alpha) * move
            else:
                largest = torch.stack([_variance(*pair, share) for pair in levels.pairs()]).amax(0)
                boost = timing.boost * math.sin(math.pi * index / levels.steps) * largest
                x = x + (_variance(levels[index], levels[index + 1], share) + boost) * move
        return x

    def _potentials(self, level: Level) -> list[Potential]:
        return [term for term in self.terms if isinstance(term, Potential) and term.strength(level) > 0]

    def _retrying(self, n: int, call: Callable[[], Result]) -> Result:
        """`call`, in smaller chunks for as long as the device is out of memory."""
        whole, inside = min(self.chunk or n, n), isinstance(self.denoiser, Guided)  # which couples its cohort: it halves

        def at_most(size: int) -> Result:
            if size < whole and not inside:
                self.chunk = size
            with any_range():  # estimates are no finished images
                return call()

        def report(now: int, then: int) -> None:
            warnings.warn(f"out of memory with {counted(now, 'image')} at once; going on with {then}", stacklevel=5)

        return in_smaller_parts(at_most, 1 if inside else whole, report)

    def _parts(self, x_t: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Tensor | None]:
        if not level.index:
            self._held.clear()  # off a path, or at the start of one: nothing to go on from
            self._moves.clear()
            for term in self.terms:
                term.begin()
        active = [term for term in self.terms if term.strength(level) > 0]
        for term in active:
            condition = term.tell(condition, level)
        if condition.perturbation is not None and not self.label_embeddings:
            names = " and ".join(term.name for term in active if not term.shifts)
            remedy = "Leave this guidance out, or return those modules from the denoiser's label_embeddings."
            raise RequestError("guidance", names, "handful does not know where this model embeds its labels", remedy)
        due = _by_turn(term for term in self._potentials(level) if term.pull.rule != "before")
        shifts = [
            -_radius(level) * direction for turn, direction in self._held.items() if turn not in due and turn[1].covers(level)
        ]
        others = [term for term in active if term.shifts and not isinstance(term, Potential)]
        if not others and not due and not shifts:
            return self._plain(x_t, level, condition), None
        _refuse_many_levels(level)

        outside = torch.is_grad_enabled() and x_t.requires_grad
        backward = any(pull.jacobian == "exact" and pull.input in ("x0_hat", "blend") for pull, _ in due)
        x = x_t if outside else x_t.detach().requires_grad_(backward)
        with torch.set_grad_enabled(outside or (backward and self._whole(len(x_t)))):
            x0_hat = self._plain(x, level, condition)
        with torch.no_grad():
            step = Step(self.denoiser, x_t.detach(), level, condition, x0_hat.detach(), self.chunk)
            others_shifts = [term.shift(step) for term in others]
        shifts += others_shifts
        estimate = x0_hat if x0_hat.requires_grad or not due else x0_hat.detach().requires_grad_()
        point = _Point(x, estimate, level, condition, shared=outside or len(due) > 1)
        # what moves the sample looks at the estimate that the sample is made of: with classifier-free guidance's shift
        used = point
        if others_shifts:
            offset = torch.stack(others_shifts).sum(0)
            with torch.enable_grad():
                used = replace(point, x0_hat=estimate + offset, offset=offset, views={})
        moves: list[tuple[Turn, Tensor]] = []
        for turn, terms in due.items():
            pull = turn[0]
            at = point if pull.rule == "shift" else used
            gradient, weight = self._pulled(terms, pull, at)
            shift = _shift(pull, terms, gradient, weight, x_t.detach(), level)
            for _ in range(pull.inner - 1):
                moved = _Point(x.detach(), (at.x0_hat.detach() + shift).requires_grad_(), level, condition)
                gradient, weight = self._pulled(terms, pull, moved)
                shift = shift + _shift(pull, terms, gradient, weight, x_t.detach(), level)
            if pull.hold:
                self._held[turn] = weight * _unit(gradient, terms)
            if pull.rule == "shift":
                shifts.append(shift)
            else:
                moves.append((turn, -gradient if pull.rule == "ancestral" else shift))
        if level.index is not None:
            self._moves[level.index] = moves
        plain = x0_hat if outside else x0_hat.detach()
        return plain, torch.stack(shifts).sum(0) if shifts else None

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

    def _chunked(self, call: Callable[[slice], Tensor], n: int) -> Tensor:
        return in_chunks(call, n, self.chunk)

    def _whole(self, n: int) -> bool:
        """Whether n images go through at once: then one graph serves forward and backward."""
        return self.chunk is None or n <= self.chunk

    def _pulled(self, terms: list[Potential], pull: Pull, point: _Point) -> tuple[Tensor, Tensor]:
        """The terms' weighted gradient, pulled back to what `pull` moves; and its rms on the images it was taken at."""
        whole, level = self._whole(len(point.x)), point.level
        through = pull.jacobian == "exact" and pull.input in ("x0_hat", "blend")
        if whole:
            images, leaf = point.seen(self, pull)
        else:
            with torch.no_grad():
                images = self._chunked(lambda part: self.seen(pull, point.x[part], point.x0_hat[part], level), len(point.x))
        cotangent, weight = self._image_cotangent(terms, pull, images.detach(), level)
        if whole:
            of = point.x if through else leaf
            (gradient,) = torch.autograd.grad(images, of, cotangent, retain_graph=point.shared)
        elif through:
            gradient = self._replayed(
                lambda x, part: self.seen(pull, x, self._again(point, x, part), level), point.x, cotangent
            )
        elif pull.input in ("x_t", "state"):
            gradient = self._replayed(lambda x, part: self.seen(pull, x, x, level), point.x, cotangent)
        else:
            gradient = self._replayed(lambda x0, part: self.seen(pull, point.x[part], x0, level), point.x0_hat, cotangent)
        if not gradient.isfinite().all():
            names = " and ".join(term.name for term in terms)
            raise RunError(
                f"guidance {names}: the gradient is not finite at sigma / alpha = {level.ratio:.4g}; "
                "the model's or the extractor's output overflows: use float32, or a smaller scale"
            )
        return gradient, weight

    def _again(self, point: _Point, x: Tensor, part: slice) -> Tensor:
        """A point's estimate for some of its images, evaluated once more."""
        x0_hat = self.denoiser(x, point.level, point.condition[part])
        return x0_hat if point.offset is None else x0_hat + point.offset[part]

    def seen(self, pull: Pull, x: Tensor, x0_hat: Tensor, level: Level) -> Tensor:
        """What potentials of this pull look at (see `Pull.input`): images, or the noisy state itself."""
        if pull.input == "state":
            return x / level.total
        if pull.input == "x_t":
            return self.denoiser.preview(
                x / x.detach().square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1), pull.reduce or 1
            )
        if pull.input == "blend":
            r = _radius(level)
            x0_hat = r * x0_hat + (1 - r) * (x / level.total)
        return self.denoiser.preview(x0_hat, pull.reduce or 1)

    def _image_cotangent(self, terms: list[Potential], pull: Pull, images: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The terms' weighted gradients with respect to what they see, added; and that sum's rms.

        For one term normalised by rms this is `strength * g / rms(g)` and the strength; several keep their proportions,
        and cancel where they disagree.
        """
        total = torch.zeros_like(images)
        for term in terms:
            gradient = self._image_gradient(term, images, level)
            if pull.normalize != "none":
                gradient = _unit(gradient, [term])
            total = total + term.measured(level) * gradient
        return total, _rms(total, terms)

    def _image_gradient(self, term: Potential, images: Tensor, level: Level) -> Tensor:
        """dU / d images (n, c, h, w), chunk by chunk through the extractor."""
        leaf, smoothing, whole = images.detach().requires_grad_(), term.pull.smoothing, self._whole(len(images))
        term = term.at(level)
        with torch.enable_grad():
            views = list(smoothing.views(leaf, level, term.seed)) if smoothing.active else [leaf]
        with torch.set_grad_enabled(whole):
            seen = [self._chunked(lambda part, v=view: term.view(v[part]), len(leaf)) for view in views]
        with torch.enable_grad():
            given = seen if whole else [one.detach().requires_grad_() for one in seen]
            energy = _averaged(term, [term.energy(one) for one in given]).sum()
            if whole:
                return torch.autograd.grad(energy, leaf)[0]
            cotangents = torch.autograd.grad(energy, given)
        back = [
            self._replayed(lambda image, part: term.view(image), view.detach(), cotangent)
            for view, cotangent in zip(views, cotangents, strict=True)
        ]
        return torch.autograd.grad(views, leaf, back)[0] if smoothing.active else back[0]

    def _replayed(self, call: Callable[[Tensor, slice], Tensor], at: Tensor, cotangent: Tensor) -> Tensor:
        """The vector-Jacobian product of `call` at `at`, chunk by chunk."""

        def product(part: slice) -> Tensor:
            leaf = at[part].detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(call(leaf, part), leaf, cotangent[part])[0]

        return self._chunked(product, len(at))


@dataclass(eq=False)
class _Point:
    """Where gradients are taken at one evaluation.

    Attributes:
        x0_hat: The estimate; with a graph where it can be had at once.
        shared: Whether the graph is needed again.
        offset: The part of x0_hat that is no estimate of the denoiser's, but a shift of other terms.
    """

    x: Tensor
    x0_hat: Tensor
    level: Level
    condition: Condition
    shared: bool = False
    offset: Tensor | None = None
    views: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def seen(self, guided: Guided, pull: Pull) -> tuple[Tensor, Tensor]:
        """What potentials of this pull look at, decoded once however many ask, and the leaf before the denoiser's output."""
        key = pull.input, pull.reduce
        if key not in self.views:
            noisy = pull.input in ("x_t", "state")
            leaf = self.x.detach().requires_grad_() if noisy else self.x0_hat
            with torch.enable_grad():
                images = guided.seen(pull, leaf if noisy else self.x, leaf, self.level)
            self.views[key] = images, leaf
        return self.views[key]


def _variance(t: Level, s: Level, share: Tensor | float) -> Tensor:
    """Of the noise that an ancestral step adds (see `Denoiser.leave`); 0 for the last step, which adds none."""
    posterior = float(posterior_deviation(t, s)) ** 2
    if not isinstance(share, Tensor):
        share = torch.tensor(share, dtype=torch.float64)
    return posterior * float(t.sigma / s.sigma) ** (2 * share) if s.sigma > 0 else torch.zeros_like(share)


def _by_turn(potentials: Iterable[Potential]) -> dict[Turn, list[Potential]]:
    due: dict[Turn, list[Potential]] = {}
    for term in potentials:
        alone = term.pull.hold or term.pull.rule in ("ancestral", "before")
        due.setdefault((term.pull, term.timing if alone else Timing()), []).append(term)
    return due


def _refuse_many_levels(level: Level) -> None:
    if level.alpha.ndim:
        raise ValueError(
            f"level: guidance acts at one level for the whole cohort, not at {len(level.alpha)}; "
            "guide images of other levels apart"
        )


def _averaged(term: Potential, energies: list[Tensor]) -> Tensor:
    """The energy over several views: of images -log mean exp(-U), the likelihood's average; of sets the mean."""
    if len(energies) == 1:
        return energies[0]
    stacked = torch.stack(energies)
    return stacked.mean(0) if term.per == "set" else math.log(len(energies)) - (-stacked).logsumexp(0)


def _shift(pull: Pull, terms: Sequence[Potential], gradient: Tensor, weight: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """What a gradient adds to x0_hat; `weight` the rms of the strengths' sum on the images (see `_image_cotangent`)."""
    if pull.normalize == "none":
        return -_absolute_factor(pull, level) * gradient
    if pull.normalize == "sample":
        size = x_t.square().mean((1, 2, 3), keepdim=True).sqrt() / level.alpha if level.alpha > 0 else 0.0
        return -size * weight * _unit(gradient, terms)
    return -_radius(level) * weight * _unit(gradient, terms)


def _rms(gradient: Tensor, terms: Sequence[Potential]) -> Tensor:
    """Root mean square (1 or n, 1, 1, 1): over the cohort if any term couples its images, so that covering and
    non-covering images keep their ratio; else, or if asked, over each image."""
    cohort = any(t.per == "set" and t.pull.normalize in ("rms", "none") for t in terms)
    over = (0, 1, 2, 3) if cohort else (1, 2, 3)
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
    """What multiplies an unnormalised gradient; at alpha = 0 x_t holds nothing of the image, and no potential acts."""
    if pull.jacobian == "gaussian" and pull.input in ("x0_hat", "blend"):
        return _radius(level) ** 2
    return float(level.sigma**2 / level.alpha) if level.alpha > 0 else 0.0

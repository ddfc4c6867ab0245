"""EDM-preconditioned networks (Karras et al. 2022, arXiv 2206.00364): `net(x, sigma, class_labels) -> denoised`.

NVlabs/edm's networks, and any module of one's own that is called alike. They come from a Python file of the user's
(`FILE.py:FUNCTION`), or out of one of NVIDIA's pickles, which hold code and so are opened only with an explicit opt-in.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition, Denoiser, NetworkDenoiser, network_input
from handful.core.noise import EDM, Level
from handful.errors import HandfulError, RequestError, first_line
from handful.models.labels import label_condition, set_labels
from handful.models.options import OF_PIPELINES, ModelOptions, refuse_options, refuse_resolution
from handful.models.source import Source
from handful.models.user_code import run_user_file

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # the paper's; a network may bound them more tightly
LABEL_EMBEDDINGS = ("map_label", "emb_label")  # what the layer of one-hot rows is called in EDM's and in EDM2's networks
UNUSED = OF_PIPELINES


class EDMDenoiser(NetworkDenoiser):
    """A network that is its own denoiser: x (n, c, h, w) and sigma (n,) -> E[x0 | x].

    Labels are 0 to label_dim - 1, given to the network as one-hot rows. With `null_class=label_dim` there is one label more,
    given as a row of zeros: that is "no class" to networks that were trained with label dropout. Nothing in a network says
    whether it was, so without that statement there is no null class.

    x reaches the network in float32 whatever precision its weights have: it adds c_skip x to its output, and x rounded to 8
    bits would show. A network of half precision runs under autocast. NVIDIA's cast inside, and offer float16 by `use_fp16`.

    Args:
        network: Called as `network(x, sigma, class_labels)`, class_labels float (n, label_dim) or None; or, where it takes
            no third argument, as k-diffusion's are: `network(x, sigma)`, with `class_cond` int64 (n,) if it has labels.
            Read where it has them: `img_channels`, `img_resolution`, `label_dim` (0), `sigma_min` (0.002), `sigma_max`
            (80), `use_fp16`; and a module named `map_label`, as in NVIDIA's, that embeds the labels.
        shape: (c, h, w) of its images; None reads the network's own.
        classes: Names of its classes by label, without the null class; empty where unknown.
        null_class: The label for "no class": label_dim, or one of the others; None where there is none.

    Raises:
        RequestError: If the shape is unknown or not of images, the levels are none, or names and labels do not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        shape: tuple[int, int, int] | None = None,
        classes: Sequence[str] = (),
        null_class: int | None = None,
    ) -> None:
        shape = _shape(network) if shape is None else shape
        if shape[0] not in (1, 3):
            raise RequestError(
                "model",
                f"img_channels {shape[0]}",
                "its images have neither 1 nor 3 channels: it makes latents, and the autoencoder that decodes them is not "
                "known",
                "Use a network of pixels, or return a handful.models.latent.LatentDenoiser from FILE.py:FUNCTION.",
            )
        lowest = max(SIGMA_MIN, float(getattr(network, "sigma_min", SIGMA_MIN)))
        highest = min(SIGMA_MAX, float(getattr(network, "sigma_max", SIGMA_MAX)))
        if not lowest < highest:
            problem = "there are no noise levels between them"
            remedy = "Set the network's sigma_min and sigma_max."
            raise RequestError("model", f"sigma_min {lowest}, sigma_max {highest}", problem, remedy)
        super().__init__(network, "edm", shape, EDM(lowest, highest))
        self.label_dim = int(getattr(network, "label_dim", 0) or 0)
        self._takes_labels = _takes_labels(network)
        zeros = self.label_dim > 0 and null_class is not None and null_class >= self.label_dim
        set_labels(self, self.label_dim + zeros, classes, null_class)

    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        return label_condition(self, labels)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        x = network_input(self.prediction, x_t, level)
        weights = next(self.network.parameters(), x).dtype
        half = weights in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else weights
        sigma = self.levels.time(level).to(x.device, dtype).expand(len(x))
        with torch.autocast(x.device.type, weights) if half and not self._casts_itself else nullcontext():
            return self.perturbed_call(x.to(dtype), sigma, condition).to(x_t.dtype)

    @property
    def label_embeddings(self) -> Sequence[nn.Module]:
        return [module for name, module in self.network.named_modules() if name.rpartition(".")[2] in LABEL_EMBEDDINGS]

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        if condition.labels is None:
            return self.network(scaled, time, *((None,) if self._takes_labels else ()))
        if not self._takes_labels:  # k-diffusion's wrappers hand keywords on to the network inside
            return self.network(scaled, time, class_cond=condition.labels.to(scaled.device))
        places = torch.arange(self.label_dim, device=scaled.device)
        one_hot = condition.labels.to(scaled.device).unsqueeze(1) == places  # the label label_dim is nowhere: zeros
        return self.network(scaled, time, one_hot.to(scaled.dtype))

    def place(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """As `Denoiser.place`; a network that casts itself keeps its weights, and takes whether to use float16.

        Raises:
            RequestError: If it knows float16 only, and bfloat16 is asked for.
        """
        if not self._casts_itself:
            super().place(device, dtype)
            return
        if dtype == torch.bfloat16:
            problem = "this network chooses its own precision, float16 or float32 only"
            raise RequestError("model.dtype", "bfloat16", problem, "Use one of those.")
        network: Any = self.network
        network.use_fp16 = dtype == torch.float16
        self.to(device)

    @property
    def _casts_itself(self) -> bool:
        return hasattr(self.network, "use_fp16")


def _takes_labels(network: nn.Module) -> bool:
    """Whether a network is called with a third argument, its labels; k-diffusion's `(input, sigma, **kwargs)` is not."""
    try:
        parameters = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):  # compiled code has no signature
        return True
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 2 or any(each.kind is each.VAR_POSITIONAL for each in parameters)


def skeleton(source: Source, options: ModelOptions) -> Denoiser:
    """The loaded denoiser itself: code and pickles show nothing before they are run."""
    return load(source, options)


def load(source: Source, options: ModelOptions) -> Denoiser:
    """Loads `FILE.py:FUNCTION`, which returns a `Denoiser` or a network for `EDMDenoiser`; or a pickle of NVIDIA's.

    Raises:
        RequestError: If it can't be loaded, is no network, or the pickle is not trusted.
    """
    refuse_options(options, *UNUSED)
    path, _, function = source.name.rpartition(":")
    made = run_user_file(Path(path), function, "model") if source.file is None else _unpickled(source.file, options)
    if isinstance(made, Denoiser):
        denoiser = made
        if options.classes is not None or options.null_class is not None:
            set_labels(
                denoiser,
                denoiser.label_count,
                denoiser.classes if options.classes is None else options.classes,
                denoiser.null_class if options.null_class is None else options.null_class,
            )
    elif isinstance(made, nn.Module):
        denoiser = EDMDenoiser(made, classes=options.classes or (), null_class=options.null_class)
    else:
        remedy = (
            "Name a function without arguments that returns a handful.core.denoiser.Denoiser, or a torch module "
            "called as net(x, sigma, class_labels)."
        )
        raise RequestError("model", source.name, f"it returns neither a denoiser nor a network ({type(made).__name__})", remedy)
    if source.file is None:  # code can change images while the weights stay the same
        denoiser.code_sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    refuse_resolution(denoiser.image_shape[1:], options)
    if options.dtype is not None:
        denoiser.place(next(denoiser.parameters(), torch.empty(0)).device, options.dtype)
    return denoiser


def _shape(network: nn.Module) -> tuple[int, int, int]:
    channels, side = getattr(network, "img_channels", None), getattr(network, "img_resolution", None)
    if channels is None or side is None:
        problem = "the network has no img_channels and img_resolution, so the shape of its images is unknown"
        remedy = "Set them, or return handful.models.edm.EDMDenoiser(network, shape=(c, h, w))."
        raise RequestError("model", type(network).__name__, problem, remedy)
    height, width = (side, side) if isinstance(side, int) else side
    return int(channels), int(height), int(width)


def _unpickled(file: Path, options: ModelOptions) -> object:
    """The network of a pickle: its exponential moving average, as NVIDIA calls it "ema", or the pickled network itself."""
    if not options.trust_pickle:
        problem = "it is a pickle: loading it runs code from whoever made it, with all your rights on this machine"
        raise RequestError("model", file, problem, "If you trust its maker, add --trust-pickle (model.trust_pickle: true).")
    try:
        with file.open("rb") as opened:
            held = pickle.load(opened)
    except HandfulError:
        raise
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        remedy = f"Install {missing}, or put the folder that holds it on PYTHONPATH."
        if missing in ("torch_utils", "dnnlib"):
            remedy = "Clone https://github.com/NVlabs/edm, and put its folder on PYTHONPATH."
        raise RequestError("model", file, f"its code needs the module {missing}, which is not installed", remedy) from error
    except Exception as error:  # the pickle's own code may raise anything
        problem = f"it can't be unpickled ({type(error).__name__}: {first_line(error)})"
        raise RequestError("model", file, problem, "Download it again: it is damaged, or no network of NVlabs/edm.") from error
    if isinstance(held, dict):
        if "ema" not in held:
            problem = f"its dictionary holds {', '.join(map(str, held))}, but no 'ema' network"
            raise RequestError("model", file, problem, "Use a network snapshot (network-snapshot-*.pkl).")
        return held["ema"]
    return held

"""DiT (Peebles & Xie 2023, arXiv 2212.09748): a class-conditional transformer of latents; diffusers' `DiTPipeline`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from handful.core.denoiser import Condition, Prediction
from handful.core.noise import Schedule
from handful.errors import RequestError
from handful.models import dit_file
from handful.models.labels import label_condition, set_labels
from handful.models.latent import LatentDenoiser, factor_of
from handful.models.options import ModelOptions, refuse_options, refuse_resolution
from handful.models.pipelines import component_on_meta, load_pipeline, on_meta, preview_decoder
from handful.models.schedulers import schedule_of
from handful.models.source import Source

UNUSED = ("lora", "embeddings", "negative_prompt", "embedded_guidance", "without", "config", "trust_pickle")


class DiTDenoiser(LatentDenoiser):
    """A `DiTTransformer2DModel` with its autoencoder.

    Its resolution is fixed, since its positions are. Its labels are those of the classes and one more, the last, which
    stood for "no class" in training: diffusers' embedding always has that row.

    Args:
        network: The transformer; as many output channels as input channels, or twice as many where it learned the variance.
        vae, prediction, levels, preview_vae: See `LatentDenoiser`.
        classes: Names of its classes by label, without the null class; empty where unknown.
        null_class: Another label for "no class" than the last.

    Raises:
        RequestError: If network and autoencoder do not fit, or names and labels do not.
    """

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        prediction: Prediction,
        levels: Schedule,
        *,
        classes: Sequence[str] = (),
        null_class: int | None = None,
        preview_vae: nn.Module | None = None,
    ) -> None:
        config: Any = network.config
        latents: Any = vae.config
        if latents.latent_channels != config.in_channels:
            problem = f"its autoencoder's latents have {latents.latent_channels}"
            remedy = "Copy transformer and vae from the same pipeline."
            raise RequestError("model", f"in_channels {config.in_channels}", problem, remedy)
        if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
            problem = "the transformer's output is neither the latents alone nor latents and variance"
            remedy = "Use one with as many output as input channels, or twice as many."
            raise RequestError("model", f"out_channels {config.out_channels}", problem, remedy)
        side = config.sample_size * factor_of(latents)
        super().__init__(network, vae, prediction, levels, (side, side), patch=config.patch_size, preview_vae=preview_vae)
        last = config.num_embeds_ada_norm
        set_labels(self, last + 1, classes, last if null_class is None else null_class)

    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        return label_condition(self, labels)

    @property
    def label_embeddings(self) -> Sequence[nn.Module]:
        """One in every block; the published networks' are copies of one."""
        network: Any = self.network
        return [block.norm1.emb.class_embedder for block in network.transformer_blocks]

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(scaled, timestep=time, class_labels=condition.labels, return_dict=False)[0]


def skeleton(source: Source, options: ModelOptions) -> DiTDenoiser:
    """The denoiser without its weights, from the configs alone: on the meta device."""
    if source.file is not None:
        network, vae, scheduler = dit_file.parts(source, options, meta=True)
        return _denoiser(network, vae, scheduler, options, None, preview_decoder(options, meta=True))
    # by name: the published configs call it a Transformer2DModel, as diffusers once did
    network = on_meta("DiTTransformer2DModel", source.config("transformer"))
    vae = component_on_meta(source, "vae", "AutoencoderKL")
    return _denoiser(network, vae, source.scheduler(), options, _id2label(source), preview_decoder(options, meta=True))


def load(source: Source, options: ModelOptions) -> DiTDenoiser:
    """Loads a pipeline's directory or hub name, or DiT's own `.pt`.

    A directory's classes are named by the `id2label` of its model_index.json.
    """
    skeleton(source, options)  # what the configs show is refused before the weights are read
    if source.file is not None:
        import diffusers

        network, vae, scheduler = dit_file.parts(source, options)
        made: Any = getattr(diffusers, str(scheduler["_class_name"])).from_config(scheduler)
        kind: Any = diffusers
        denoiser = from_pipeline(kind.DiTPipeline(network, vae, made), options)
        denoiser.notes = (*denoiser.notes, f"model: {dit_file.TIMES}")
        return denoiser
    return from_pipeline(load_pipeline(source, options, "DiTPipeline"), options, _id2label(source))


def from_pipeline(pipeline: Any, options: ModelOptions, id2label: object = None) -> DiTDenoiser:
    """A denoiser that shares a `DiTPipeline`'s networks.

    Args:
        id2label: The full names of its classes, by label. The pipeline itself keeps only their parts, sorted.
    """
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    denoiser = _denoiser(pipeline.transformer, pipeline.vae, scheduler, options, id2label, preview_decoder(options))
    denoiser.pipeline = pipeline
    return denoiser


def class_names(id2label: object, count: int) -> tuple[str, ...]:
    """The names of classes 0 to count - 1, in full ("tench, Tinca tinca"); empty unless every class has one.

    Names that several classes have (ImageNet knows two cranes) get their label behind, `crane (134)`, all of them: so each
    can be asked for, and none by mistake. What differs in capitals only counts as one, as it does for folders.
    """
    if not isinstance(id2label, dict):
        return ()
    by_label = {str(label): name for label, name in id2label.items()}
    names = [by_label.get(str(label)) for label in range(count)]
    if not all(isinstance(name, str) for name in names):
        return ()
    told = [str(name) for name in names]
    seen = Counter(name.casefold() for name in told)
    return tuple(f"{name} ({label})" if seen[name.casefold()] > 1 else name for label, name in enumerate(told))


def _id2label(source: Source) -> object:
    return (source.read_json("model_index.json") or {}).get("id2label")


def _denoiser(
    network: nn.Module,
    vae: nn.Module,
    scheduler: dict[str, Any],
    options: ModelOptions,
    id2label: object,
    preview_vae: nn.Module | None,
) -> DiTDenoiser:
    refuse_options(options, *UNUSED)
    levels, prediction = schedule_of(scheduler)
    config: Any = network.config
    last = config.num_embeds_ada_norm
    # with another null class the names would no longer be those of all the other labels
    names = class_names(id2label, last) if options.null_class in (None, last) else ()
    denoiser = DiTDenoiser(
        network,
        vae,
        prediction,
        levels,
        classes=names if options.classes is None else options.classes,
        null_class=options.null_class,
        preview_vae=preview_vae,
    )
    refuse_resolution(denoiser.image_shape[1:], options)
    return denoiser

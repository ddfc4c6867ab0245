"""guided-diffusion checkpoints: against a forward pass written here from the architecture alone, and what is refused of them.

The forward pass knows state dicts by ADM's names, and nothing of diffusers or of the conversion. Its attention splits heads as
the flag of the checkpoint says; its random weights leave none of the paths at zero, as fresh ADM weights would.
"""

import itertools
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adm import State, Variant, checkpoint, layout, saved
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from handful.core.noise import VP
from handful.core.samplers import ddpm
from handful.errors import RequestError
from handful.models import load, skeleton
from handful.models.adm import PUBLISHED, Settings
from handful.models.unet2d import UNet2DDenoiser

# --- the independent forward pass ----------------------------------------------------------------------------------------


def forward(v: Variant, state: State, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    """ADM's UNet (Dhariwal & Nichol 2021, section 3), from its state dict: x (n, c, h, w), time (n,)."""

    def weights(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, *weights(name), eps=1e-5)

    def conv(name: str, h: Tensor, **words: int) -> Tensor:
        weight, bias = weights(name)
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2, **words)

    def doubled(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(name: str, h: Tensor, change: str) -> Tensor:
        size = {"up": doubled, "down": lambda z: F.avg_pool2d(z, 2)}.get(change, lambda z: z)
        inner = conv(f"{name}.in_layers.2", size(F.silu(norm(f"{name}.in_layers.0", h))))
        told = F.linear(F.silu(embedded), *weights(f"{name}.emb_layers.1"))[:, :, None, None]
        if v.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        else:
            inner = norm(f"{name}.out_layers.0", inner + told)
        inner = conv(f"{name}.out_layers.3", F.silu(inner))
        h = size(h)
        return inner + (conv(f"{name}.skip_connection", h) if f"{name}.skip_connection.weight" in state else h)

    def attention(name: str, h: Tensor) -> Tensor:
        n, c, height, width = h.shape
        heads = v.heads_of(c)
        flat = norm(f"{name}.norm", h).flatten(2)
        qkv = F.conv1d(flat, *weights(f"{name}.qkv"))
        # legacy: a head's q, k and v lie together; new: all heads' q lie together, then all k, then all v
        q, k, v_ = (
            qkv.view(n, 3, heads, c // heads, -1).unbind(1) if v.new_order else qkv.view(n, heads, 3, c // heads, -1).unbind(2)
        )
        weight = (q.transpose(-1, -2) @ k / (c // heads) ** 0.5).softmax(-1)
        mixed = (v_ @ weight.transpose(-1, -2)).reshape(n, c, -1)
        return h + F.conv1d(mixed, *weights(f"{name}.proj_out")).view(n, c, height, width)

    frequency = torch.exp(-math.log(10000) * torch.arange(v.base // 2, dtype=torch.float32) / (v.base // 2))
    angle = time.float()[:, None] * frequency
    wave = torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype)
    embedded = F.linear(F.silu(F.linear(wave, *weights("time_embed.0"))), *weights("time_embed.2"))
    if labels is not None:
        embedded = embedded + state["label_emb.weight"][labels]
    h = conv("input_blocks.0.0", x)
    stack = [h]
    for name, kind, _, _ in layout(v):
        if kind == "push":
            stack.append(h)
        elif kind == "attention":
            h = attention(name, h)
        elif kind == "down conv":
            h = conv(f"{name}.op", h, stride=2)
        elif kind == "up conv":
            h = conv(f"{name}.conv", doubled(h))
        else:
            h = block(name, torch.cat([h, stack.pop()], dim=1) if kind == "pop res" else h, kind)
    assert not stack
    return conv("out.2", F.silu(norm("out.0", h)))


# --- parity ------------------------------------------------------------------------------------------------------------


def inputs(v: Variant, dtype: torch.dtype = torch.float32, n: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(n, v.colours, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x, torch.linspace(3, 987.6, n), torch.arange(n) % v.classes if v.classes else None


def off(denoiser: Any, v: Variant, state: State, dtype: torch.dtype) -> float:
    """The largest difference of the loaded network's output to the independent one's, over that one's largest value."""
    x, time, labels = inputs(v, dtype)
    with torch.no_grad():
        wanted = forward(v, state, x, time, labels)
        found = denoiser.network(x, time, class_labels=labels, return_dict=False)[0]
    assert found.shape == wanted.shape == (2, v.colours * (1 + v.learned), 8, 8)
    return float((found - wanted).abs().max() / wanted.abs().max())


VARIANTS = [  # half of all 64: those with an even number of options on, among which any five options take every combination
    Variant(new, scale, updown, 5 * classes, 4 if heads else None, learned)
    for new, scale, updown, classes, heads, learned in itertools.product((False, True), repeat=6)
    if (new + scale + updown + classes + heads + learned) % 2 == 0
]


@pytest.mark.parametrize("v", VARIANTS, ids=lambda v: "-".join(str(x) for x in list(v.__dict__.values())[:6]))
def test_the_converted_network_is_the_checkpoints_own(tmp_path, v):
    denoiser = load(saved(tmp_path, v))
    assert off(denoiser, v, checkpoint(v), torch.float32) < 1e-5


@pytest.mark.parametrize(
    "v",
    [
        Variant(),
        Variant(new_order=True, classes=5),
        Variant(heads=4, scale_shift=False, resblock_updown=False),
        Variant(blocks=3, attention=(0, 2), multiples=(1, 2, 3), heads=2),
        Variant(blocks=2, attention=(1,), multiples=(1, 1, 2, 4)),  # none on the lowest level, as FFHQ's
        Variant(attention=(), multiples=(2, 1), blocks=2),
        Variant(base=64, multiples=(0.5, 1, 2), classes=3),  # the first level narrower than the embedding, as at 512 pixels
        Variant(multiples=(1,), attention=(0,), colours=1),
    ],
)
def test_in_double_precision_they_agree_to_rounding_for_every_shape_of_network(tmp_path, v):
    state = checkpoint(v, dtype=torch.float64)
    denoiser = load(saved(tmp_path, v, state), dtype=torch.float64)
    assert off(denoiser, v, state, torch.float64) < 1e-12


@pytest.mark.parametrize("v", [Variant(), Variant(heads=4), Variant(new_order=True)])
@pytest.mark.parametrize("wrong", [{"new_attention_order": True}, {"num_heads": 2, "num_head_channels": None}])
def test_the_wrong_attention_order_or_number_of_heads_is_far_off(tmp_path, v, wrong):
    if "new_attention_order" in wrong:
        wrong = {"new_attention_order": not v.new_order}
    told = {key: value for key, value in {**v.settings(), **wrong}.items() if value is not None}
    denoiser = load(saved(tmp_path, v, settings=told))
    assert off(denoiser, v, checkpoint(v), torch.float32) > 0.05


def test_with_one_head_both_orders_are_one(tmp_path):
    """Where head by head is all there is, nothing may be permuted: pins that the rows stay in place then."""
    v = Variant(heads=1)
    denoiser = load(saved(tmp_path, v, settings={**v.settings(), "new_attention_order": True}))
    assert off(denoiser, v, checkpoint(v), torch.float32) < 1e-5


def test_the_denoiser_takes_eps_of_the_output_and_keeps_the_learned_variance(tmp_path):
    v = Variant(classes=5)
    denoiser = load(saved(tmp_path, v))
    x, _, _ = inputs(v)
    labels, at = torch.tensor([4, 1]), denoiser.levels.spacing(4)[1]
    with torch.no_grad():
        out = forward(v, checkpoint(v), x, denoiser.levels.time(at).float().expand(2), labels)
        found = denoiser(x, at, denoiser.condition(labels))
    eps, variance = out.chunk(2, dim=1)
    torch.testing.assert_close(found, (x - at.sigma * eps) / at.alpha, rtol=1e-4, atol=1e-4)
    assert denoiser.learned_variance is not None
    torch.testing.assert_close(denoiser.learned_variance, variance, rtol=1e-4, atol=1e-4)
    assert denoiser.learns_variance
    assert denoiser.shape == (3, 8, 8)


def test_a_checkpoint_that_learned_its_variance_is_sampled_with_it(tmp_path):
    v = Variant()
    denoiser = load(saved(tmp_path, v))
    x, _, _ = inputs(v)

    def sampled(variance: Any) -> Tensor:
        draw = torch.Generator().manual_seed(3)
        fresh = lambda: torch.randn(x.shape, generator=draw)  # noqa: E731
        with torch.no_grad():
            return ddpm(denoiser, x, denoiser.levels.spacing(3), denoiser.condition([0, 0]), noise=fresh, variance=variance)

    assert bool(sampled("learned").isfinite().all())
    assert not torch.allclose(sampled("learned"), sampled("small"))


# --- what is known and what is told --------------------------------------------------------------------------------------


def published(size: int, classes: int) -> Variant:
    """guided-diffusion's README, flag by flag."""
    if size == 64:
        return Variant(True, classes=classes, base=192, multiples=(1, 2, 3, 4), blocks=3, attention=(1, 2, 3))
    if size == 128:
        return Variant(heads=4, classes=classes, base=256, multiples=(1, 1, 2, 3, 4), blocks=2, attention=(2, 3, 4))
    if size == 512:
        return Variant(classes=classes, base=256, multiples=(0.5, 1, 1, 2, 2, 4, 4), blocks=2, attention=(4, 5, 6))
    return Variant(classes=classes, base=256, multiples=(1, 1, 2, 2, 4, 4), blocks=2, attention=(3, 4, 5))


FFHQ = Variant(base=128, multiples=(1, 1, 2, 2, 4, 4), blocks=1, attention=(4,))


class Shapes(TorchDispatchMode):
    """Makes `checkpoint` of meta tensors: full-size shapes without memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        words = {**(kwargs or {}), **({"device": "meta", "generator": None} if "randn" in str(func) else {})}
        return func(*args, **words)


@pytest.mark.parametrize(
    ("v", "size", "parameters"),
    [  # millions of parameters as published (Dhariwal & Nichol 2021, P2-weighting), without labels less 1000 x 1024
        (published(64, 1000), 64, 296),
        (published(128, 1000), 128, 422),
        (published(256, 1000), 256, 554),
        (published(256, 0), 256, 553),
        (published(512, 1000), 512, 559),
        (published(512, 0), 512, 558),
        (FFHQ, 256, 93.5),
    ],
)
def test_published_checkpoints_are_known_without_a_json_file(tmp_path, v, size, parameters):
    file = tmp_path / "published.pt"
    with Shapes():
        torch.save(checkpoint(v), file)  # of full size, but without the 2 GB
    denoiser: Any = skeleton(file)
    assert denoiser.shape == (3, size, size)
    assert denoiser.label_count == v.classes
    count = sum(p.numel() for p in denoiser.network.parameters())
    assert count / 1e6 == pytest.approx(parameters, abs=0.6)
    assert {p.device.type for p in denoiser.network.parameters()} == {"meta"}
    wanted = VP.cosine() if size == 64 else VP.linear()
    torch.testing.assert_close(denoiser.levels.sigma, wanted.sigma, rtol=0, atol=1e-12)
    for name, module in denoiser.network.named_modules():
        if hasattr(module, "to_q"):
            channels = module.to_q.in_features
            assert module.heads == (4 if size == 128 else channels // 64), name
            assert module.scale == pytest.approx((channels / module.heads) ** -0.5)


def test_only_imagenet_64_is_of_the_new_order_and_cosine_and_only_128_fixes_its_heads():
    special = {s.image_size for s in PUBLISHED.values() if s.new_attention_order or s.schedule == "cosine"}
    assert special == {64}
    assert {s.image_size for s in PUBLISHED.values() if s.num_heads} == {128}
    assert {s.steps for s in PUBLISHED.values()} == {1000}


def test_an_unknown_network_without_json_is_refused_with_the_keys_to_write_and_where(tmp_path):
    v = Variant(classes=5)
    file = saved(tmp_path, v)
    file.with_suffix(".json").unlink()
    for call in (skeleton, load):
        with pytest.raises(RequestError) as caught:
            call(file)
        text = str(caught.value)
        assert text.startswith("model: ")
        for said in ("tiny.json", "num_head_channels (or num_heads)", "image_size", "new_attention_order", "schedule", "steps"):
            assert said in text
        assert "base 32" in text
    # the example in the message is a file that is read
    example = text[text.index("{") : text.index("}") + 1]
    assert Settings.model_validate_json(example).steps == 1000


@pytest.mark.parametrize("key", ["image_size", "num_head_channels", "new_attention_order", "schedule", "steps"])
def test_a_json_that_leaves_out_a_key_is_refused_with_that_key_alone(tmp_path, key):
    told = Variant().settings()
    del told[key]
    with pytest.raises(RequestError, match=rf"does not say {key}[^,]*\. Write"):
        load(saved(tmp_path, Variant(), settings=told))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image_size": "8"}, "image_size"),
        ({"image_size": 10}, "multiple of 4"),
        ({"steps": 1}, "steps"),
        ({"schedule": "sqrt"}, "schedule"),
        ({"new_attention_order": "no"}, "new_attention_order"),
        ({"num_head_channels": 48}, "num_head_channels 48 does not divide"),
        ({"num_heads": 4}, "both num_heads and num_head_channels"),
        ({"learn_sigma": True}, "learn_sigma"),
        ({"classes": ["a"] * 5, "null_class": True}, "null_class"),
    ],
)
def test_a_wrong_json_is_refused_by_its_key(tmp_path, wrong, said):
    with pytest.raises(RequestError, match=rf"^model: .*{said}"):
        skeleton(saved(tmp_path, Variant(classes=5), settings={**Variant().settings(), **wrong}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", b"\xff\xfe"])
def test_a_damaged_json_is_refused_by_its_name(tmp_path, text):
    file = saved(tmp_path, Variant())
    file.with_suffix(".json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError, match=r"^model: .*tiny\.json"):
        load(file)


def test_schedule_steps_classes_and_null_class_come_from_the_json_and_arguments_go_before_it(tmp_path):
    told = {**Variant().settings(), "schedule": "cosine", "steps": 50, "classes": ["a", "b", "c", "d"], "null_class": 4}
    file = saved(tmp_path, Variant(classes=5), settings=told)
    denoiser = load(file)
    torch.testing.assert_close(denoiser.levels.spacing(50, "linspace").sigma[:-1].flip(0), VP.cosine(50).sigma)
    assert list(denoiser.classes) == ["a", "b", "c", "d"]
    null = denoiser.condition([0]).null().labels
    assert null is not None
    assert null.tolist() == [4]
    assert load(file, null_class=0, classes=list("wxyz")).null_class == 0


def test_a_linear_schedule_of_other_steps_ends_in_the_same_noise(tmp_path):
    denoiser: Any = load(saved(tmp_path, Variant(), settings={**Variant().settings(), "steps": 4000}))
    assert len(denoiser.levels) == 4000
    # betas of 1e-4 and 2e-2 at 1000 steps are a quarter of that at 4000 (Nichol & Dhariwal 2021)
    assert float(denoiser.levels.sigma[0] ** 2) == pytest.approx(0.25e-4)
    assert float(denoiser.levels.alpha[-1]) == pytest.approx(float(VP.linear().alpha[-1]), rel=0.2)


def test_another_resolution_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"^model\.resolution: .*8 x 8"):
        skeleton(saved(tmp_path, Variant()), resolution=(16, 16))


def test_options_that_mean_nothing_here_are_refused_by_name_trust_in_pickles_too(tmp_path):
    file = saved(tmp_path, Variant())
    for name, given in {"trust_pickle": True, "variant": "fp16", "negative_prompt": "blurred"}.items():
        with pytest.raises(RequestError, match=rf"^model\.{name}: .*does not use it"):
            load(file, **{name: given})


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "ema", "model"])
def test_a_nested_state_dict_with_module_prefixes_and_the_older_file_format_load_alike(tmp_path, key):
    v = Variant()
    nested = {key: {f"module.{name}": tensor for name, tensor in checkpoint(v).items()}, "step": 7}
    denoiser = load(saved(tmp_path, v, nested, name="tiny.pth", _use_new_zipfile_serialization=False))
    assert off(denoiser, v, checkpoint(v), torch.float32) < 1e-5


def test_half_precision_checkpoints_load_in_float32_and_options_choose_another(tmp_path):
    half = {name: tensor.half() for name, tensor in checkpoint(Variant()).items()}
    file = saved(tmp_path, Variant(), half)
    assert {p.dtype for p in load(file).parameters()} == {torch.float32}
    denoiser = load(file, dtype=torch.bfloat16)
    assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}
    x, _, _ = inputs(Variant())
    assert denoiser(x, denoiser.levels.spacing(4)[2], denoiser.condition([0, 0])).dtype == torch.float32


def test_loaded_weights_are_frozen_and_outlive_their_file(tmp_path):
    v = Variant()
    file = saved(tmp_path, v)
    denoiser = load(file)
    assert isinstance(denoiser, UNet2DDenoiser)
    assert not any(p.requires_grad for p in denoiser.parameters())
    with file.open("r+b") as held:  # a mapped file would change the weights with it
        held.write(b"\0" * file.stat().st_size)
    assert off(denoiser, v, checkpoint(v), torch.float32) < 1e-5


def test_a_skeleton_knows_all_but_the_weights(tmp_path):
    v = Variant(classes=5, heads=4)
    outline, denoiser = (call(saved(tmp_path, v)) for call in (skeleton, load))
    assert {p.device.type for p in outline.parameters()} == {"meta"}
    assert (outline.shape, outline.label_count, outline.learns_variance) == ((3, 8, 8), 5, True)
    shapes = [{name: p.shape for name, p in d.network.named_parameters()} for d in (outline, denoiser)]
    assert shapes[0] == shapes[1]


class Payload:
    """What a pickle may hold: a call, made while it is read."""

    def __init__(self, call: Any, mark: Path) -> None:
        self.call, self.mark = call, mark

    def __reduce__(self):
        return self.call, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("runs", "name"), [(os.mkdir, "posix.mkdir"), (shutil.rmtree, "shutil.rmtree")])
def test_a_pickle_that_needs_more_is_refused_by_the_name_of_what_it_needs_and_does_not_run(tmp_path, runs, name, zipped):
    mark = tmp_path / "mark"
    if runs is shutil.rmtree:
        mark.mkdir()
    state = {**checkpoint(Variant()), "extra": Payload(runs, mark)}
    file = saved(tmp_path, Variant(), state, _use_new_zipfile_serialization=zipped)
    for call in (skeleton, load):
        with pytest.raises(RequestError, match=rf"^model: .*pickle contains {name}, so reading it would run code"):
            call(file)
    assert mark.exists() == (runs is shutil.rmtree)  # as it was


def upsampler(v: Variant) -> State:
    state = checkpoint(v)
    return {**state, "input_blocks.0.0.weight": state["input_blocks.0.0.weight"].repeat(1, 2, 1, 1)}


def classifier(v: Variant) -> State:
    state = {name: t for name, t in checkpoint(v).items() if not name.startswith(("output_blocks", "out."))}
    pool = {"out.2.positional_embedding": torch.zeros(64, 65), "out.2.qkv_proj.weight": torch.zeros(192, 64, 1)}
    return {**state, **pool}


def without(name: str) -> Any:
    return lambda v: {key: tensor for key, tensor in checkpoint(v).items() if not key.startswith(name)}


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (classifier, "it is a classifier"),
        (upsampler, "takes 6 channels, not 1 or 3: it is an upsampler"),
        (
            lambda v: {"conv_in.weight": torch.zeros(1), "down_blocks.0.resnets.0.norm1.weight": torch.zeros(1)},
            "diffusers' own",
        ),
        (lambda v: {"layer.weight": torch.zeros(2, 2)}, "no input_blocks.0.0.weight"),
        (lambda v: {"step": 3, "loss": 0.5}, "holds no state dict"),
        (lambda v: {}, "holds no state dict"),
        (lambda v: [1, 2], "holds no state dict"),
        (lambda v: torch.zeros(3), "holds no state dict"),
        (without("out.2"), "no out.2.weight"),
        (without("middle_block.1"), "no middle_block.1.qkv.weight"),
        (without("input_blocks.3.0.in_layers.2"), "no input_blocks.3.0.in_layers.2.weight"),
        (without("output_blocks.4"), r"12 differ, first up_blocks\.2\.resnets\.0"),
        (without("output_blocks.5"), "5 output blocks don't make"),
        (without("input_blocks.1.0.norm"), None),  # nothing is left out: the control
        (without("middle_block.0.in_layers.0.bias"), r"1 differ, first mid_block\.resnets\.0\.norm1\.bias"),
        (lambda v: {**checkpoint(v), "input_blocks.1.2.transformer.weight": torch.zeros(2)}, r"first input_blocks\.1\.2"),
        (lambda v: {**checkpoint(v), "out.2.weight": torch.tensor(3.0)}, "no out.2.weight"),
        (lambda v: {**checkpoint(v), "label_emb.weight": torch.tensor(3.0)}, "single numbers"),
        (lambda v: {**checkpoint(v), "input_blocks.1.0.in_layers.2.weight": torch.zeros(48, 32, 3, 3)}, "in 32 groups"),
        (lambda v: {**checkpoint(v), "middle_block.1.qkv.weight": torch.zeros(191, 64, 1)}, "tensors are not those"),
        (lambda v: {**checkpoint(v), "middle_block.1.proj_out.weight": torch.zeros(64, 65, 1)}, r"first middle_block\.1\.proj"),
    ],
)
def test_what_is_no_diffusion_checkpoint_is_refused_by_name(tmp_path, make, said, learned):
    v = Variant(learned=learned)
    file = saved(tmp_path, v, make(v))
    if said is None:
        load(file)
        return
    for call in (skeleton, load):
        with pytest.raises(RequestError, match=rf"^model: '.*tiny\.pt'.*{said}"):
            call(file)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 7, 1000, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep, zipped):
    file = saved(tmp_path, Variant(), _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(RequestError, match=r"^model: .*can't be read"):
        load(file)


@pytest.mark.parametrize("data", [b"no checkpoint", b"PK\x03\x04 not a zip", pickle.dumps([1, 2, 3]), b"\x80\x02."])
def test_garbage_is_refused(tmp_path, data):
    file = tmp_path / "garbage.pt"
    file.write_bytes(data)
    for call in (skeleton, load):
        with pytest.raises(RequestError, match=r"^model: .*garbage\.pt"):
            call(file)

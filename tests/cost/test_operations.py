"""The count of operations and live bytes, against torch's own counter, closed forms, and the CPU against the meta device."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from handful.cost.operations import Count

FLOAT = 4  # bytes


def unet(device: str) -> UNet2DModel:
    """Convolutions, linear layers and attention."""
    with torch.device(device), torch.random.fork_rng():
        network = UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        )
    return network.eval().requires_grad_(False)


def test_a_network_without_attention_counts_as_torchs_own_counter_has_it():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(1024, 5)
    )
    x = torch.zeros(2, 3, 8, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        network(x)
    with torch.no_grad(), Count() as ours:
        network(x)
    assert ours.total == theirs.get_total_flops() > 0


def test_a_matrix_product_counts_two_operations_a_multiply_add():
    with Count() as count:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
    assert count.total == 2 * 3 * 5 * 7


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_two_products_forward_and_five_backward_on_every_device(device: str):
    q, k, v = (torch.zeros(2, 3, n, 16, device=device, requires_grad=True) for n in (10, 20, 20))
    product = 2 * 2 * 3 * 10 * 20 * 16
    count = Count()
    with count:
        out = count.through("attention", lambda q: scaled_dot_product_attention(q, k, v), q)
        torch.autograd.grad(out, q, torch.ones_like(out))
    assert count.flops == {"attention": 2 * product, "attention backward": 5 * product}


def test_the_meta_device_counts_what_the_cpu_computes_forward_and_back():
    counts = []
    for device in ("cpu", "meta"):
        network, count = unet(device), Count()
        x, t = torch.zeros(2, 3, 16, 16, device=device, requires_grad=True), torch.zeros(2, device=device)
        with count:
            out = count.through("network", lambda x, network=network, t=t: network(x, t).sample, x)
            torch.autograd.grad(out.square().sum(), x)
        counts.append(count)
    real, meta = counts
    assert real.flops == meta.flops
    assert real.flops["network"] > 0
    assert real.flops["network backward"] > 0
    assert meta.peak == pytest.approx(real.peak, rel=0.02), "but for what the CPU's attention keeps of its softmax"


def test_going_back_counts_for_the_part_it_goes_through_and_no_further():
    first, second = torch.zeros(8, 16), torch.zeros(16, 4)
    x = torch.zeros(2, 8, requires_grad=True)
    count = Count()
    with count:
        middle = count.through("first", lambda x: x @ first, x)
        out = count.through("second", lambda x: x @ second, middle)
        (gradient,) = torch.autograd.grad(out.sum(), middle, retain_graph=True)
        assert count.flops == {"first": 2 * 2 * 8 * 16, "second": 2 * 2 * 16 * 4, "second backward": 2 * 2 * 16 * 4}
        gradient @ torch.zeros(16, 1)
        assert count.flops["other"] == 2 * 2 * 16, "the part ends with its gradient"
        torch.autograd.grad(out.sum(), x)
    assert count.flops["second backward"] == 2 * (2 * 2 * 16 * 4)
    assert count.flops["first backward"] == 2 * 2 * 8 * 16


def test_marks_change_no_gradient():
    def cube(x: Tensor) -> Tensor:
        return (x**3).sum(1, keepdim=True)

    x = torch.arange(6.0).view(2, 3).requires_grad_()
    count = Count()
    with count:
        (ours,) = torch.autograd.grad(count.through("cube", cube, x).sum(), x)
    assert torch.equal(ours, 3 * x.detach() ** 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_is_what_is_held_at_once(device: str):
    x = torch.zeros(1000, device=device)
    count = Count()
    with torch.no_grad(), count:
        a = x + 1
        b = a * 2
        view = b.view(10, 100).t()  # holds nothing of its own
        del a, b
        assert count.live == 1000 * FLOAT
        c = view + 1
        x.add_(1)  # was there before
        assert count.live == 2000 * FLOAT
    assert count.peak == 2000 * FLOAT
    del view, c
    assert count.live == 0


def test_a_graph_holds_what_its_backward_pass_needs():
    x = torch.zeros(1000, device="meta", requires_grad=True)
    with Count() as without, torch.no_grad():
        x.exp().exp().exp()
    with Count() as graph:
        out = x.exp().exp().exp()
    assert without.peak == 2000 * FLOAT, "the layer's input and output"
    assert graph.peak == 3000 * FLOAT, "every layer's output"
    del out


def test_attention_on_the_meta_device_never_holds_the_scores():
    q = torch.zeros(1, 1, 4096, 8, device="meta", requires_grad=True)
    with Count() as count:
        torch.autograd.grad(scaled_dot_product_attention(q, q, q).sum(), q)
    assert count.peak < 4096 * 4096 * FLOAT / 10


def test_a_question_about_numbers_is_said_yes_only_where_there_are_none():
    with Count():
        assert torch.zeros(3, device="meta").isfinite().all()
        assert not torch.tensor([float("nan")]).isfinite().all()
    with pytest.raises(Exception, match="meta"):
        bool(torch.zeros(1, device="meta"))

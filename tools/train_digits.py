"""Trains the packaged digits: a diffusion model that has collapsed onto typical digits, and three classifiers.

    python tools/train_digits.py                        everything, into src/handful/zoo/digits
    python tools/train_digits.py --only judge --out /tmp/digits --steps 100

The diffusion model (v-prediction, VP cosine, min-SNR-5 weights of Hang et al. 2023, arXiv 2303.09556, 10 % null class,
moving average of the weights) sees only the 40 % most typical training digits of each class: it stands for big models
that generate the typical image again and again. Guide and judge see the whole training split. They differ in seed,
architecture, size, augmentation and loss, so that images that merely please the guide do not please the judge. `uci-judge`
is the judge again, for digits at MNIST's size: it learns from the 900 digits that the demo draws exemplars from, and has
seen none of its 897 test digits. The same machine and number of threads give the same bytes.
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save
from torch import Generator, Tensor, nn

from handful.zoo.digits import CLASSES, DigitsSplit, load_digits_split, typical
from handful.zoo.digits_classifier import DigitsClassifier
from handful.zoo.mnist import as_digits, load_uci_split

NULL_CLASS = len(CLASSES)
NULL_SHARE = 0.1
TYPICAL_SHARE = 0.4
TRAINING_LEVELS = 1000
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "handful" / "zoo" / "digits"
# The diffusion model stops early: after 2,000 steps it copies (unet/README.md says by how much).
DEFAULT_STEPS = {"diffusion": 900, "guide": 800, "judge": 800, "uci-judge": 800}
JUDGE = {"width": 40, "architecture": "residual", "feature_size": 96}


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(path: Path, network: nn.Module) -> None:
    """Writes under a temporary name first, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    temporary.write_bytes(save(weights, metadata={"format": "pt"}))  # save_file would make it readable by its owner only
    os.replace(temporary, path)


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    return peak * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimize(
    network: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    peak_rate: float,
    weight_decay: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW on `loss_of_step`, with gradients clipped to norm 1."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate, warm_up=100)
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        after_step(step)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 200 == 0:
            print(f"  step {step + 1} of {steps}, loss {average:.4f}", flush=True)


def build_unet() -> UNet2DModel:
    """8x8 -> 4x4 -> 8x8, attention on the 4x4 grid; 0.7 M parameters."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL_CLASS + 1,
        norm_num_groups=8,
        attention_head_dim=32,
    )


def train_diffusion(split: DigitsSplit, out: Path, seed: int, steps: int, batch: int = 128) -> None:
    """Trains the collapsed diffusion model and writes it as diffusers loads it."""
    torch.manual_seed(seed)
    random = Generator().manual_seed(seed)
    chosen = typical(split.train_images, split.train_labels, TYPICAL_SHARE)
    images, labels = split.train_images[chosen], split.train_labels[chosen]
    network = build_unet().train()
    average = copy.deepcopy(network).requires_grad_(False)
    scheduler = DDPMScheduler(
        num_train_timesteps=TRAINING_LEVELS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    alphas, sigmas = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    print(f"diffusion: {sum(p.numel() for p in network.parameters()):,} parameters, {len(images)} images")

    def loss_of_step(step: int) -> Tensor:
        pick = torch.randint(len(images), (batch,), generator=random)
        null = torch.rand(batch, generator=random) < NULL_SHARE
        x0, told = images[pick], torch.where(null, NULL_CLASS, labels[pick])
        # One level from each of `batch` equal strata: less noise in the loss than independent draws.
        strata = (torch.arange(batch) + torch.rand(batch, generator=random)) / batch
        t = (strata * TRAINING_LEVELS).long()
        alpha, sigma = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
        eps = torch.randn(x0.shape, generator=random)
        v = network(alpha * x0 + sigma * eps, t, class_labels=told).sample
        error = (v - (alpha * eps - sigma * x0)).square().mean((1, 2, 3))
        snr = (alpha / sigma).square().flatten()
        # An error in v of e is an error in x0 of sigma e: min(SNR, 5) on x0 is min(SNR, 5) / (SNR + 1) on v.
        return (error * snr.clamp(max=5) / (snr + 1)).mean()

    def update_average(step: int) -> None:
        # The half-life grows to 1/20 of the training so far, so that the random first weights are soon forgotten.
        keep = 0.5 ** (1 / (0.05 * (step + 1) + 1))
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)

    optimize(network, loss_of_step, steps, peak_rate=2e-3, weight_decay=0.01, after_step=update_average)
    write_weights(out / "unet" / "diffusion_pytorch_model.safetensors", average)
    average.save_config(out / "unet")
    scheduler.save_config(out / "scheduler")
    write_json(out / "handful.json", {"classes": list(CLASSES), "null_class": NULL_CLASS})


def shift_and_noise(images: Tensor, random: Generator) -> Tensor:
    """The guide's augmentation: each image moved by up to one whole pixel each way, and a little noise. (n, 1, 8, 8)."""
    n = len(images)
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    rows = torch.randint(3, (n, 1, 1), generator=random) + torch.arange(8).view(1, 8, 1)
    columns = torch.randint(3, (n, 1, 1), generator=random) + torch.arange(8).view(1, 1, 8)
    moved = padded[torch.arange(n).view(n, 1, 1), 0, rows, columns].unsqueeze(1)
    return moved + 0.1 * torch.randn(moved.shape, generator=random)


def warp_and_blur(images: Tensor, random: Generator) -> Tensor:
    """The judge's augmentation: small turns, stretches, shears and sub-pixel moves; contrast, blur, noise. (n, 1, 8, 8)."""
    n = len(images)

    def uniform(largest: float, *shape: int) -> Tensor:
        return largest * (2 * torch.rand(n, *shape, generator=random) - 1)

    # A matrix near the identity: its diagonal stretches, the rest turns and shears. The last column moves: 0.2 is 0.8 pixel.
    matrix = torch.eye(2).expand(n, 2, 2) + uniform(0.15, 2, 2)
    grid = F.affine_grid(torch.cat([matrix, uniform(0.2, 2, 1)], dim=2), list(images.shape), align_corners=False)
    ink = F.grid_sample((images + 1) / 2, grid, align_corners=False)  # paper is 0 here, as is what lies outside
    blurred = F.avg_pool2d(F.pad(ink, (1, 1, 1, 1)), 3, stride=1)
    ink = ink.lerp(blurred, 0.25 + uniform(0.25, 1, 1, 1)) * (1 + uniform(0.2, 1, 1, 1))
    noise_scale = 0.15 + uniform(0.15, 1, 1, 1)
    return 2 * ink - 1 + noise_scale * torch.randn(ink.shape, generator=random)


def train_classifier(
    split: DigitsSplit,
    folder: Path,
    seed: int,
    steps: int,
    network_config: dict,
    augment: Callable[[Tensor, Generator], Tensor],
    label_smoothing: float,
    batch: int = 128,
    half: bool = False,
) -> None:
    """Trains one classifier on the whole training split and writes it with its accuracy on the held-out digits.

    `half` keeps its weights as float16: half the size, and the accuracy is measured with what is written.
    """
    torch.manual_seed(seed)
    random = Generator().manual_seed(seed)
    classifier = DigitsClassifier(**network_config).train()
    print(f"{folder.name}: {sum(p.numel() for p in classifier.parameters()):,} parameters")

    def loss_of_step(step: int) -> Tensor:
        pick = torch.randint(len(split.train_images), (batch,), generator=random)
        logits = classifier(augment(split.train_images[pick], random))
        return F.cross_entropy(logits, split.train_labels[pick], label_smoothing=label_smoothing)

    optimize(classifier, loss_of_step, steps, peak_rate=3e-3, weight_decay=0.05)
    classifier.eval()
    if half:
        classifier.half().float()
    with torch.no_grad():
        predicted = classifier(split.test_images).argmax(1)
    accuracy = (predicted == split.test_labels).double().mean().item()
    print(f"{folder.name}: {accuracy:.4f} of the held-out digits are named rightly")
    write_weights(folder / "model.safetensors", classifier.half() if half else classifier)
    write_json(folder / "config.json", {"network": network_config, "held_out_accuracy": round(accuracy, 4)})


def train_guide(split: DigitsSplit, out: Path, seed: int, steps: int) -> None:
    network = {"width": 32, "architecture": "plain", "feature_size": 64}
    train_classifier(split, out / "guide", seed + 1, steps, network, shift_and_noise, label_smoothing=0.0)


def train_judge(split: DigitsSplit, out: Path, seed: int, steps: int) -> None:
    train_classifier(split, out / "judge", seed + 2, steps, JUDGE, warp_and_blur, label_smoothing=0.05)


def train_uci_judge(split: DigitsSplit, out: Path, seed: int, steps: int) -> None:
    """The judge for the demo's own split, whose digits it sees as it will see them: at MNIST's size, and back at 8 x 8."""
    own = load_uci_split()
    own = own._replace(train_images=as_digits(own.train_images), test_images=as_digits(own.test_images))
    train_classifier(own, out / "uci-judge", seed + 3, steps, JUDGE, warp_and_blur, label_smoothing=0.05, half=True)


PARTS = {"diffusion": train_diffusion, "guide": train_guide, "judge": train_judge, "uci-judge": train_uci_judge}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the parts take seed to seed + 3 (default: 0)")
    parser.add_argument("--steps", type=int, help=f"training steps of every part (default: {DEFAULT_STEPS})")
    parser.add_argument("--only", choices=PARTS, help="train this part alone; its bytes do not depend on the others")
    parser.add_argument("--threads", type=int, default=1, help="of torch; another number may give other bytes (default: 1)")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least one step is needed")

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    split = load_digits_split()
    for name in [arguments.only] if arguments.only else PARTS:
        begin = time.perf_counter()
        PARTS[name](split, arguments.out, arguments.seed, arguments.steps or DEFAULT_STEPS[name])
        print(f"{name}: written to {arguments.out} after {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""The downstream classifier: learns what there is to learn, from the images it is given alone, the same way each time."""

import pytest
import torch
from torch import Tensor

from handful.errors import RequestError
from handful.judge.utility import SmallClassifier, _mirrored, _shifted, accuracy, downstream_accuracy, train_classifier
from handful.zoo.digits import load_digits_split


@pytest.fixture(scope="module")
def split():
    return load_digits_split()


STEPS = 60


def test_real_digits_teach_it_real_digits(split):
    found = downstream_accuracy(
        split.train_images, split.train_labels, split.test_images, split.test_labels, steps=150, width=16
    )
    assert found > 0.93


def test_wrong_labels_teach_it_wrong_digits(split):
    """The number is of the training images: shifted labels give an accuracy near 0, not near chance."""
    found = downstream_accuracy(
        split.train_images, (split.train_labels + 1) % 10, split.test_images, split.test_labels, steps=150, width=16
    )
    assert found < 0.05


def test_a_narrower_training_set_teaches_less(split):
    """One image a class, repeated, against all of them: the arbiter tells diversity apart."""
    first = torch.stack([torch.nonzero(split.train_labels == label)[0, 0] for label in range(10)])
    few = downstream_accuracy(
        split.train_images[first], torch.arange(10), split.test_images, split.test_labels, steps=STEPS, width=8
    )
    many = downstream_accuracy(
        split.train_images, split.train_labels, split.test_images, split.test_labels, steps=STEPS, width=8
    )
    assert many > few + 0.1


def test_training_is_the_same_for_a_seed_and_leaves_the_global_generator_alone(split):
    def weights(seed: int) -> Tensor:
        network = train_classifier(split.train_images, split.train_labels, 10, steps=10, width=8, seed=seed)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    torch.manual_seed(1)
    first, after = weights(0), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)  # training drew nothing from it
    torch.manual_seed(999)
    assert torch.equal(weights(0), first)  # nor did it depend on it
    assert not torch.equal(weights(1), first)


def test_a_trained_classifier_answers_each_image_for_itself(split):
    network = train_classifier(split.train_images, split.train_labels, 10, steps=10, width=8)
    together = network(split.test_images[:6])
    alone = torch.cat([network(image[None]) for image in split.test_images[:6]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_accuracy_is_the_share_of_hits_over_batches_of_any_size():
    class Sign(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            first = images.flatten(1)[:, 0]
            return torch.stack([-first, first], 1)

    images = torch.cat([torch.ones(700, 1, 2, 2), -torch.ones(300, 1, 2, 2)])
    labels = torch.cat([torch.ones(650), torch.zeros(350)]).long()
    assert accuracy(Sign(), images, labels) == 0.95


def test_augmentation_shifts_a_batch_by_an_eighth_at_most():
    ramp = torch.arange(16.0).view(1, 1, 1, 16).expand(8, 1, 16, 16)
    draw, seen = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        moved = _shifted(ramp, draw)
        assert moved.shape == ramp.shape
        seen.add(float(moved[0, 0, 8, 8]) - 8)
    assert seen == {-2.0, -1.0, 0.0, 1.0, 2.0}  # 40 draws miss one of 5 with a chance of 7e-4; the seed is fixed


def test_flipping_mirrors_each_image_or_leaves_it():
    ramp = torch.arange(16.0).view(1, 1, 1, 16).expand(400, 1, 16, 16)
    found = _mirrored(ramp, torch.Generator().manual_seed(0))
    mirrored = (found == ramp.flip(-1)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], ramp[~mirrored])
    assert 150 < int(mirrored.sum()) < 250  # outside with a chance below 1e-6


def test_each_augmentation_acts_only_where_it_is_asked_for():
    """Training on one lopsided image a class: what the classifier has seen shows in what it knows."""
    images = -torch.ones(2, 1, 8, 8)
    images[0, :, :, :2], images[1, :, :, 6:] = 1, 1  # a bar left, a bar right
    labels = torch.tensor([0, 1])
    mirrored, plainly = (train_classifier(images, labels, 2, steps=40, width=4, flip=flip) for flip in (True, False))
    with torch.no_grad():
        mixed, plain = mirrored(images).softmax(1), plainly(images).softmax(1)
    assert float((mixed - 0.5).abs().max()) < 0.2  # mirrored half the time, the two classes are one
    assert float(plain.diagonal().min()) > 0.8
    without, again = (train_classifier(images, labels, 2, steps=10, width=4, augment=a).head.weight for a in (False, True))
    assert not torch.equal(without, again)


@pytest.mark.parametrize(
    ("count", "labels"), [(2, [0, 1]), (4, [0, 1, 2, 3]), (4, [0, 1, 2, -1]), (0, [])], ids=["few", "high", "negative", "none"]
)
def test_images_or_labels_that_cannot_make_a_classifier_are_refused_by_name(count, labels):
    with pytest.raises(RequestError, match=r"^labels: "):
        train_classifier(torch.zeros(count, 1, 8, 8), torch.tensor(labels, dtype=torch.int64), 3)


def test_images_and_labels_of_different_numbers_are_refused_by_name():
    with pytest.raises(RequestError, match=r"^labels: "):
        train_classifier(torch.zeros(9, 1, 8, 8), torch.arange(6) % 3, 3)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_too_few_steps_for_a_one_cycle_rate_are_refused_by_name(split, steps):
    with pytest.raises(RequestError, match=rf"^steps: {steps}: "):
        train_classifier(split.train_images, split.train_labels, 10, steps=steps)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 64), (1, 9)])
def test_images_of_any_size_and_channels_make_logits(channels, side):
    assert SmallClassifier(channels, 7, width=4)(torch.zeros(2, channels, side, side)).shape == (2, 7)


def test_a_function_augments_each_batch_by_the_trainings_own_draws(split):
    """Images that are all made alike teach nothing, however many there are; and the draws are the seed's."""
    seen: list[Tensor] = []

    def blank(images: Tensor, draw: torch.Generator) -> Tensor:
        seen.append(torch.rand((), generator=draw))
        return torch.zeros_like(images)

    options = {"steps": 20, "width": 8, "augment": blank}
    found = [
        downstream_accuracy(split.train_images, split.train_labels, split.test_images, split.test_labels, **options)
        for _ in range(2)
    ]
    assert found[0] == found[1] < 0.3
    assert len(seen) == 40
    assert seen[:20] == seen[20:]


def test_by_groups_a_picture_of_another_contrast_and_brightness_is_the_same_picture(split):
    """Batch statistics are the training images'; a group's are the image's own (up to the borders' padding with zeros)."""
    by_groups, by_batch = (
        train_classifier(split.train_images, split.train_labels, 10, steps=60, width=8, groups=groups) for groups in (8, None)
    )
    faint = 0.25 * split.test_images + 0.5
    right = [accuracy(network, faint, split.test_labels) for network in (by_groups, by_batch)]
    assert right[0] > right[1] + 0.2

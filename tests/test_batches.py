"""Batches: their order and draws, the shards of several processes, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from conftest import CPU, tiny_images
from utils import InputError
from utils.batches import EpochOrder, evaluation_batches, training_batches
from utils.data import ImageData, with_validation
from utils.recipes import Recipe
from utils.transforms import BatchAugmentation

OFF = Recipe(name="off", batch_size=5, padding=0, flip=0, cutout=0)
ALL = Recipe(name="all", batch_size=8, padding=4, flip=0.5, cutout=4)

both_paths = pytest.mark.parametrize("per_image", [False, True])


def training_data(images):
    """The label of an image is its number."""
    labels = torch.arange(len(images))
    return ImageData("numbered", ("a", "b"), images, labels, images[:1], labels[:1])


def numbered(count, side=12):
    """Images whose every pixel is the image's number."""
    return training_data(torch.arange(count).byte().view(-1, 1, 1, 1).repeat(1, 3, side, side))


def repeated(count, side=16):
    """The same picture over and over: only the draws tell its copies apart."""
    picture = torch.arange(3 * side * side).fmod(251).byte().view(1, 3, side, side)
    return training_data(picture.repeat(count, 1, 1, 1))


def make(recipe, images, *, per_image=False, workers=0, **settings):
    recipe = recipe.replace(per_image=per_image)
    return training_batches(recipe, images, device=CPU, workers=workers, **settings)


def epoch(batches, number):
    """All of an epoch: images, labels."""
    batches.set_epoch(number)
    return collect(batches)


def collect(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def in_order(images, labels):
    return images[labels.argsort()]


def equal(first, second):
    return all(map(torch.equal, first, second))


# Training: what comes


@both_paths
def test_every_image_once_with_its_label_and_a_short_last_batch(per_image):
    images = numbered(23)
    batches = make(OFF, images, per_image=per_image)
    assert len(batches) == 5
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    outputs, labels = collect(batches)
    assert outputs.dtype == torch.float32 and labels.dtype == torch.int64
    assert sorted(labels.tolist()) == list(range(23)) != labels.tolist()
    mean, std = (value.view(3, 1, 1) for value in images.statistics)
    expected = (labels.view(-1, 1, 1, 1) / 255 - mean) / std
    torch.testing.assert_close(outputs, expected.expand_as(outputs).float())


@both_paths
def test_training_images_are_normalised_to_mean_0_and_deviation_1(per_image):
    outputs = collect(make(OFF, tiny_images(), per_image=per_image))[0]
    zeros, ones = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(outputs.mean((0, 2, 3)), zeros, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.std((0, 2, 3), correction=0), ones, rtol=0, atol=1e-5)


@both_paths
def test_padding_mode_of_the_recipe_arrives(per_image):
    """Mirrored, a picture of one grey stays so wherever it is cropped."""
    recipe = ALL.replace(padding_mode="reflect", cutout=0)
    outputs, _ = collect(make(recipe, numbered(20), per_image=per_image))
    assert (outputs == outputs[..., :1, :1]).all()


def test_images_have_the_size_of_the_epoch():
    batches = make(OFF.replace(epochs=6, sizes=(8, 12)), numbered(20))
    shapes = [tuple(epoch(batches, number)[0].shape[-2:]) for number in range(6)]
    assert shapes == [(8, 8)] * 3 + [(12, 12)] * 3


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_alternating_flip_shows_each_image_and_its_mirror_image_in_turns(share):
    images = training_data(tiny_images().train_images)
    batches = make(OFF.replace(alternating_flip=True, flip=share), images, seed=1)
    normal = batches.augment.normalize(images.train_images)
    seen = [in_order(*epoch(batches, number)) for number in range(4)]
    mirrored = [(picture != normal).flatten(1).any(1) for picture in seen]
    chosen = mirrored[0].view(-1, 1, 1, 1)
    assert torch.equal(seen[0], torch.where(chosen, normal.flip(3), normal))
    assert torch.equal(seen[1], seen[0].flip(3) if share else normal)
    assert torch.equal(seen[2], seen[0]) and torch.equal(seen[3], seen[1])
    assert mirrored[0].float().mean() == pytest.approx(share, abs=0.25)


# Training: order and draws


@both_paths
@pytest.mark.parametrize("number", [0, 3])
def test_order_is_that_of_torchs_loader(per_image, number):
    """Recorded runs depend on it."""
    order = np.random.SeedSequence((7, number)).generate_state(2)[0]
    generator = torch.Generator().manual_seed(int(order))
    expected = DataLoader(range(42), shuffle=True, batch_size=8, generator=generator)
    batches = make(OFF.replace(batch_size=8), tiny_images(), per_image=per_image, seed=7)
    batches.set_epoch(number)
    labels = tiny_images().train_labels
    for (_, found), chosen in zip(batches, expected, strict=True):
        assert torch.equal(found, labels[chosen])


@both_paths
def test_epoch_depends_on_seed_and_number_alone(per_image):
    images = repeated(20)
    batches = make(ALL, images, per_image=per_image, seed=5)
    epochs = [epoch(batches, number) for number in range(4)]
    torch.manual_seed(99)
    np.random.seed(99)
    again = make(ALL, images, per_image=per_image, seed=5)
    assert equal(epoch(again, 3), epochs[3])
    other = epoch(make(ALL, images, per_image=per_image, seed=6), 3)
    for outputs, labels in [*epochs[:3], other]:
        assert not torch.equal(labels, epochs[3][1]), "the same order"
        assert not torch.equal(outputs, epochs[3][0]), "the same draws"


@pytest.mark.parametrize("per_image, workers", [(False, 0), (True, 0), (True, 2)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_epoch_cut_off_leaves_no_trace_and_an_iterator_waits_for_its_epoch(per_image, workers):
    """A run that broke off sees that epoch again as it was.

    Lightning makes the iterator first and sets the epoch then.
    """
    batches = make(ALL, repeated(48), per_image=per_image, workers=workers)
    whole = epoch(batches, 1)
    batches.set_epoch(0)
    next(iter(batches))
    iterator = iter(batches)
    batches.set_epoch(1)
    assert equal(collect(iterator), whole)


@both_paths
def test_draws_go_on_from_batch_to_batch(per_image):
    outputs, _ = collect(make(ALL, repeated(48), per_image=per_image))
    assert len({image.numpy().tobytes() for image in outputs}) >= 47  # of 26,000 that there are


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.skipif(not there, reason=f"no {kind.upper()} device here"))
    for kind, there in (
        ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())
    )
])
def test_an_accelerator_draws_anew_for_each_batch(kind):
    images = repeated(48)
    batches = training_batches(ALL, images, device=torch.device(kind))
    first, _ = epoch(batches, 0)
    assert first.device.type == kind
    assert len({image.cpu().numpy().tobytes() for image in first}) >= 47
    assert equal(epoch(batches, 0), epoch(batches, 0))
    assert not torch.equal(epoch(batches, 1)[0], first)
    augment = BatchAugmentation(ALL, *images.statistics)
    generator = torch.Generator(kind).manual_seed(0)
    pictures = images.train_images.to(kind)
    assert not torch.equal(augment(pictures, generator), augment(pictures, generator))


# Image by image


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_draws_of_an_image_depend_on_seed_epoch_and_index_alone():
    """Albumentations by itself repeats them in each worker and in each epoch."""
    images = repeated(48)
    workers = make(ALL, images, per_image=True, workers=2)
    epochs = [epoch(workers, number) for number in range(2)]
    assert not any(tensor.is_shared() for batch in workers for tensor in batch)  # Docker has little
    everything = torch.cat([outputs for outputs, _ in epochs])
    assert len({image.numpy().tobytes() for image in everything}) >= 95
    assert equal(epoch(workers, 1), epochs[1])
    here = make(ALL, images, per_image=True)
    assert equal(epoch(here, 0), epochs[0]) and equal(epoch(here, 1), epochs[1])
    larger = make(ALL.replace(batch_size=20), images, per_image=True)
    assert torch.equal(in_order(*epoch(larger, 1)), in_order(*epochs[1]))


# Several processes


@settings(max_examples=100)
@given(
    count=st.integers(1, 200), processes=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1), number=st.integers(0, 99),
)
def test_shards_deal_out_the_order_and_are_equally_long(count, processes, seed, number):
    """Where that leaves some over, the order begins again."""
    def shard(rank, processes):
        order = EpochOrder(count, seed=seed, rank=rank, processes=processes)
        order.epoch = number
        assert len(order.indices()) == len(order)
        return order.indices().tolist()

    order = shard(0, 1)
    assert sorted(order) == list(range(count))
    dealt = [i for turn in zip(*(shard(rank, processes) for rank in range(processes)), strict=True)
             for i in turn]
    assert len(dealt) < count + processes
    assert dealt == (order * processes)[: len(dealt)] and set(dealt) == set(order)


@both_paths
def test_processes_have_images_and_draws_of_their_own(per_image):
    images = repeated(40)
    first, second = (
        epoch(make(ALL, images, per_image=per_image, rank=rank, processes=2), 0)
        for rank in range(2)
    )
    assert sorted([*first[1].tolist(), *second[1].tolist()]) == list(range(40))
    assert not torch.equal(first[0], second[0])
    batches = make(ALL, images, per_image=per_image, rank=1, processes=2)
    assert [len(labels) for _, labels in batches] == [4] * 5  # of the recipe's 8


def test_no_two_epochs_of_any_processes_and_seeds_have_the_same_draws():
    draws = set()
    for seed in range(3):
        for rank in range(4):
            order = EpochOrder(10, seed=seed, rank=rank, processes=4)
            for order.epoch in range(5):
                draws.add(order.draws())
    assert len(draws) == 3 * 4 * 5


@pytest.mark.parametrize("processes", [3, 16])
def test_batch_that_processes_can_not_share(processes):
    words = f"evenly, by at least two images each; .* --batch-size .* multiple of {processes}$"
    with pytest.raises(InputError, match=words):
        make(OFF.replace(batch_size=16), numbered(40), processes=processes)


@pytest.mark.parametrize("sizes, side", [((16, 32), 64), ((16,), 32)])
def test_sizes_that_do_not_end_with_that_of_the_test_images(sizes, side):
    words = rf"^sizes [^\n]* the test images, \({side}, {side}\); [^\n]*--resize {sizes[-1]}$"
    with pytest.raises(InputError, match=words):
        make(OFF.replace(sizes=sizes), numbered(40, side))


# A single image of 8 to 15 pixels a side leaves one value a channel


@pytest.mark.parametrize("count, side, settings", [
    (21, 8, {}), (21, 15, {}), (21, 32, {"sizes": (8, 32)}),
])
def test_last_batch_of_a_single_small_image_is_refused(count, side, settings):
    with pytest.raises(InputError, match="^the last batch is a single image .* --batch-size$"):
        make(OFF.replace(**settings), numbered(count, side))


def test_last_batch_of_a_single_small_image_in_each_process_is_refused():
    with pytest.raises(InputError, match="^the last batch is a single image"):
        make(OFF.replace(batch_size=8), numbered(10, 8), processes=2)


@pytest.mark.parametrize("count, side, settings", [
    (22, 8, {}), (21, 16, {}), (21, 32, {}), (21, 32, {"sizes": (16, 32)}),
])
def test_other_last_batches_are_fine(count, side, settings):
    assert len(make(OFF.replace(**settings), numbered(count, side))) == 5


# Evaluation


def pixels_with_numbers(count):
    """Test images of one pixel, whose red and green are the label, the image's number."""
    labels = torch.arange(count)
    codes = torch.stack([labels // 256, labels % 256, 0 * labels], dim=1).byte()
    return replace(tiny_images(), test_images=codes.view(-1, 3, 1, 1), test_labels=labels)


def evaluated(images, *, processes):
    """What each of several processes gets."""
    scale = torch.zeros(3), torch.full((3,), 1 / 255)  # gives back the numbers 0 to 255
    return [
        evaluation_batches(images, statistics=scale, device=CPU, rank=rank, processes=processes)
        for rank in range(processes)
    ]


@settings(max_examples=60)
@given(count=st.integers(1, 5000), processes=st.integers(1, 6))
def test_each_image_is_evaluated_once_in_as_many_batches_by_each_process(count, processes):
    images = pixels_with_numbers(count)
    if count < processes:
        with pytest.raises(InputError, match=f"^{count} images .* {processes} processes"):
            evaluated(images, processes=processes)
        return
    every = evaluated(images, processes=processes)
    assert len({len(batches) for batches in every}) == 1
    for rank, batches in enumerate(every):
        assert {len(labels) for _, labels in batches} <= set(range(1, 1001))
        outputs, found = collect(batches)
        numbers = (outputs[:, :2, 0, 0].round() @ torch.tensor([256.0, 1.0])).long()
        assert torch.equal(found, images.test_labels[rank::processes])
        assert torch.equal(numbers, found)


def test_2001_images_are_as_many_batches_for_both_processes():
    every = evaluated(pixels_with_numbers(2001), processes=2)
    sizes = [[len(labels) for _, labels in batches] for batches in every]
    assert sizes == [[501, 500], [500, 500]]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_images_are_evaluated_as_they_are(split):
    """Normalised by the training images: the others are to stay unseen."""
    images = with_validation(tiny_images(), fraction=0.3)
    pixels, expected_labels = getattr(images, f"{split}_images"), getattr(images, f"{split}_labels")
    known = images.train_images.double() / 255
    mean, std = (
        value.view(3, 1, 1) for value in (known.mean((0, 2, 3)), known.std((0, 2, 3), correction=0))
    )
    batches = evaluation_batches(images, split, device=CPU)
    for _ in range(2):
        outputs, labels = collect(batches)
        expected = ((pixels.double() / 255 - mean) / std).float()
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)
        assert torch.equal(labels, expected_labels)

import time

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from depthlab.data import Batches, ImageData
from depthlab.data.augment import Crop, Shift
from depthlab.data.batches import generator
from depthlab.data.module import held_out
from depthlab.problem import Problem

MEAN, STD = (100.0, 120.0, 140.0), (50.0, 60.0, 70.0)


def made(n=60, batch_size=12, **options):
    images = torch.randint(256, (n, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return Batches(images, torch.arange(n), batch_size, mean=MEAN, std=STD, **options)


def labels_of(batches):
    return torch.cat([y for _, y in batches]).tolist()


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(p, q) and torch.equal(s, t) for (p, s), (q, t) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_batch(memory_format):
    batches = made(memory_format=memory_format)
    x, y = next(iter(batches))
    assert x.shape == (12, 3, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous() == (memory_format == "contiguous")
    assert x.is_contiguous(memory_format=torch.channels_last) == (memory_format == "channels_last")
    want = (batches.images[:12].float() - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.equal(x, want.permute(0, 3, 1, 2))
    assert len(batches) == len(list(batches)) == 5


@pytest.mark.parametrize("augment", [Shift(), Shift(interpolation="nearest"), Crop(2), Crop(2, fill="mean")])
def test_a_function_of_seed_and_epoch_alone(augment):
    batches, again = made(augment=augment, shuffle=True, seed=3), made(augment=augment, shuffle=True, seed=3)
    zero, repeated = list(batches), list(batches)
    assert same(zero, repeated)
    batches.set_epoch(1)
    one = list(batches)
    again.set_epoch(1)
    torch.manual_seed(99)  # the global generator plays no part
    assert same(one, list(again))
    assert labels_of(zero) != labels_of(one)
    assert labels_of(made(shuffle=True, seed=4)) != labels_of(zero)
    for epoch in (zero, one):
        assert sorted(labels_of(epoch)) == list(range(60))


def test_seeds_and_epochs_do_not_share_streams():
    first = {torch.rand(1, generator=generator(s, e)).item() for s in range(20) for e in range(20)}
    assert len(first) == 400


def test_the_epoch_is_read_late():
    batches = made(shuffle=True)
    early = iter(batches)
    batches.set_epoch(5)
    late = next(iter(batches))[1]
    assert torch.equal(next(early)[1], late)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("augment", [None, Shift(), Crop(2, fill="mean")])
def test_ranks_share_each_global_batch(ranks, augment):
    options = {"augment": augment, "shuffle": True, "seed": 1}
    shares = [list(made(rank=r, world_size=ranks, **options)) for r in range(ranks)]
    dealt = [(torch.cat([x for x, _ in b]), torch.cat([y for _, y in b])) for b in zip(*shares, strict=True)]
    assert all(len(y) == 12 // ranks for share in shares for _, y in share)
    assert same(dealt, list(made(**options)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [7, 23, 60])
@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_evaluation_counts_every_image_once(ranks, n, batch_size):
    shares = [made(n, batch_size, rank=r, world_size=ranks) for r in range(ranks)]
    assert sorted(y for share in shares for y in labels_of(share)) == list(range(n))
    assert len({len(share) for share in shares}) == 1
    sizes = [len(y) for share in shares for _, y in share]
    assert min(sizes) >= 1
    if ranks == 1:
        assert max(sizes) <= batch_size
        assert labels_of(shares[0]) == list(range(n))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"world_size": 5}, "data.batch_size=12 .* trainer.devices=5; the next that does is 15"),
        ({"n": 61}, "gives each device 1 image .*data.drop_last=true"),
        ({"n": 62, "world_size": 2}, "gives each device 1 image .*data.drop_last=true"),
        ({"n": 63, "world_size": 2}, "the last batch has 3 images .*trainer.devices=2; set data.drop_last=true"),
        ({"n": 11, "drop_last": True}, "leaves no batch: 11 images .*data.batch_size=12"),
    ],
)
def test_batches_that_cannot_be_dealt(options, says):
    with pytest.raises(Problem, match=says):
        made(shuffle=True, **options)


def test_last_batches():
    assert [len(y) for _, y in made(62, shuffle=True)] == [12] * 5 + [2]
    assert [len(y) for _, y in made(61, shuffle=True, drop_last=True)] == [12] * 5
    with pytest.raises(Problem, match=r"1 images to evaluate are fewer than trainer\.devices=2"):
        made(1, world_size=2)
    with pytest.raises(Problem, match="uint8 with N labels"):
        Batches(torch.zeros(4, 8, 8, 3), torch.zeros(4), 2, mean=MEAN, std=STD)


def test_subset():
    chosen = torch.tensor([5, 9, 2, 33])
    assert labels_of(made(batch_size=4, subset=chosen)) == [5, 9, 2, 33]
    assert sorted(labels_of(made(batch_size=2, subset=chosen, shuffle=True, augment=Crop(1)))) == [2, 5, 9, 33]


@pytest.mark.parametrize("count", [1, 37, 500, 999])
def test_held_out_is_stratified_and_seeded(count):
    labels = torch.arange(10).repeat_interleave(torch.tensor([10, 190] * 5))
    train, val = held_out(labels, count, seed=0)
    assert sorted(torch.cat([train, val]).tolist()) == list(range(1000))
    assert len(val) == count
    due = torch.bincount(labels) * count / 1000
    assert (torch.bincount(labels[val], minlength=10) - due).abs().max() <= 1
    assert torch.equal(val, held_out(labels, count, seed=0)[1])
    assert count > 900 or not torch.equal(val, held_out(labels, count, seed=1)[1])


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    ImageData(dir=path).prepare_data()
    return path


def ready(path, **options):
    data = ImageData(dir=path, **options)
    data.setup()
    return data


def test_module_without_trainer(digits_dir):
    data = ImageData(dir=digits_dir, augment=Crop(), val_size=200)
    data.prepare_data()
    data.setup()
    assert (data.num_classes, data.image_size, len(data.classes), data.evaluated_on) == (10, 32, 10, "val")
    train, val, (test, plain) = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [b.count for b in (train, val, test, plain)] == [1300, 200, 297, 1300]
    assert [b.augment is not None for b in (train, val, test, plain)] == [True, False, False, False]
    assert set(train.subset.tolist()).isdisjoint(val.subset.tolist())
    assert (
        train.images.data_ptr() == val.images.data_ptr() == data.arrays.train_images.ctypes.data
    )  # the map, not a copy
    x = torch.cat([x for x, _ in ready(digits_dir).test_dataloader()[1]]).double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_statistics_can_be_given(digits_dir):
    data = ready(digits_dir, mean=[0, 0, 0], std=[255, 255, 255])
    x, _ = next(iter(data.val_dataloader()))
    assert data.evaluated_on == "test"
    assert x.min() == 0
    assert 0.9 < x.max() <= 1
    with pytest.raises(Problem, match=r"data\.std must be > 0"):
        ready(digits_dir, std=[0, 1, 1]).train_dataloader()


@pytest.mark.parametrize(("size", "on_cpu", "on_gpu"), [(None, 250, 500), (7, 7, 7)])
def test_how_many_are_evaluated_at_once(digits_dir, size, on_cpu, on_gpu):
    data = ready(digits_dir, eval_batch_size=size)
    assert data.evaluated_at_once(torch.device("cpu")) == on_cpu
    assert data.evaluated_at_once(torch.device("cuda")) == on_gpu
    assert len(data.val_dataloader()) == -(-297 // on_cpu)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"val_size": -1}, "data.val_size must be a whole number >= 0, got -1"),
        ({"val_size": 0.1}, "data.val_size .* got 0.1"),
        ({"val_size": 1500}, "data.val_size=1500 leaves none of 1500"),
        ({"batch_size": 0}, "data.batch_size .* got 0"),
        ({"eval_batch_size": True}, "data.eval_batch_size .* got True"),
        ({"mean": [1, 2]}, r"data.mean must have three numbers, on the 0-255 scale, got \[1, 2\]"),
        ({"size": 96}, "data.size=96, but the images of .* are 32x32"),
        ({"classes": 11}, "data.classes=11, but .* names 10"),
    ],
)
def test_bad_options(digits_dir, options, says):
    with pytest.raises(Problem, match=says):
        ready(digits_dir, **options)


class Watch(LightningModule):
    """Notes the labels it is given."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = torch.nn.Linear(1, 1), {}

    def training_step(self, batch, _):
        self.seen.setdefault(self.current_epoch, []).append(batch[1].clone())
        return self.net(batch[0].mean().view(1, 1)).sum()

    def validation_step(self, batch, _):
        assert len(batch[1]) > 0

    def test_step(self, batch, batch_idx, dataloader_idx):
        self.seen.setdefault(f"test{dataloader_idx}", []).append(batch[1].clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6 on torch >= 2.15
def test_lightning_tells_the_epoch(digits_dir, tmp_path):
    data, watch = ImageData(dir=digits_dir, augment=Shift(), seed=0), Watch()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", use_distributed_sampler=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(watch, data)
    alone = ready(digits_dir, augment=Shift()).train_dataloader()
    for epoch in range(2):
        alone.set_epoch(epoch)
        assert torch.cat(watch.seen[epoch]).tolist() == labels_of(alone)
    trainer.test(watch, data, verbose=False)
    assert torch.cat(watch.seen["test0"]).tolist() == data.arrays.test_labels.tolist()
    assert torch.cat(watch.seen["test1"]).tolist() == data.arrays.train_labels.tolist()


def test_several_times_faster_than_pil(digits_dir):
    """Measured 13 to 19 times on one thread; 3 leaves room for a busy machine."""
    from PIL import Image
    from torchvision import transforms

    data = ready(digits_dir, augment=Crop())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    chain = transforms.Compose(
        [
            transforms.RandomCrop(32, 4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    images = data.arrays.train_images

    def ours():
        return sum(len(y) for _, y in data.train_dataloader())

    def theirs():
        order = np.random.permutation(300)
        return sum(
            len(torch.stack([chain(Image.fromarray(images[i])) for i in order[a : a + 100]])) for a in (0, 100, 200)
        )

    def timed(work):
        start = time.process_time()
        n = work()
        return (time.process_time() - start) / n

    try:
        rounds = [(timed(ours), timed(theirs)) for _ in range(4)][1:]
    finally:
        torch.set_num_threads(before)
    assert min(t for _, t in rounds) > 3 * min(o for o, _ in rounds)

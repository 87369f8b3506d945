"""The benchmark's counts against sums by hand, and that each ratio is that of its two rows."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import CPU, Small, tiny_images
from utils import InputError, devices, files, models
from utils.maintenance import benchmark
from utils.recipes import recipe


def small(num_classes=10):
    return Small(num_classes)


@pytest.fixture(scope="module")
def measured():
    """Measured with a small network, and at a made-up rate of matrix products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        patch.setattr(benchmark, "CustomResNet", small)
        patch.setattr(benchmark, "recipe", lambda name: recipe(name).scaled(batch_size=4))
        patch.setattr(benchmark, "matmul_rates", lambda *_: [4, 5, 7])
        patch.setattr(benchmark, "own_process", lambda _, function, *args, **how: function(
            *args, **how
        ))  # another process would have the network at its full size
        return benchmark.measure(device=CPU, images=8, repeats=2)


@pytest.fixture
def table(measured):
    return measured[0]


@pytest.fixture
def rows(table):
    return table.set_index("what")


def test_flop_of_the_network():
    """Multiply-adds of each convolution by hand; the first needs no gradient of its input."""
    prep = 3 * 64 * 9 * 32**2
    others = (
        64 * 128 * 9 * 32**2 + 2 * 128 * 128 * 9 * 16**2 + 128 * 256 * 9 * 16**2
        + 256 * 512 * 9 * 8**2 + 2 * 512 * 512 * 9 * 4**2 + 512 * 10
    )
    assert benchmark.training_flops() == 2 * (2 * prep + 3 * others)


def test_rows_are_speeds_within_their_spread(table):
    assert list(table) == ["what", "unit", "median", "lowest", "highest"]
    assert table["what"].is_unique
    assert (table["lowest"] > 0).all()
    assert (table["lowest"] <= table["median"]).all()
    assert (table["median"] <= table["highest"]).all()
    units = table["unit"].value_counts().to_dict()
    assert units == {"GFLOP/s": 1, "images/s": 4, "times": 4, "ms/image": 8}


@pytest.mark.parametrize("ratio, over, under", [
    ("our training over plain", benchmark.OURS, benchmark.PLAIN),
    ("Lightning over our loop", benchmark.LIGHTNING, benchmark.OURS),
    ("freed memory kept over given back", benchmark.OURS, benchmark.GIVEN_BACK),
])
def test_ratios_are_those_of_the_medians(rows, ratio, over, under):
    over, under, ratio = rows.loc[over], rows.loc[under], rows.loc[ratio]
    assert ratio["median"] == over["median"] / under["median"]
    assert ratio["lowest"] == over["lowest"] / under["highest"]
    assert ratio["highest"] == over["highest"] / under["lowest"]


def test_share_of_the_matrix_product(rows, monkeypatch):
    monkeypatch.setattr(benchmark, "CustomResNet", small)
    flops = rows.loc[benchmark.OURS, "median"] * benchmark.training_flops()
    share = rows.loc["our training over the matrix product", "median"]
    assert share == pytest.approx(flops / 5e9, rel=1e-9)
    name = devices.dtype_name(devices.amp_dtype(CPU))
    assert rows.loc[f"matrix product, {name}", "median"] == 5


@pytest.mark.parametrize("device, size", [("meta", 16384), ("cpu", 4096)])
def test_rate_of_matrix_products_as_precise_as_convolutions(device, size, monkeypatch):
    """Larger on an accelerator, here one that has no numbers. The clock is made up, but waits for
    this device and no other."""
    ran, waited = [], []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *device: waited.append(device))

    def timer(products, *, globals, num_threads, timer):
        timer()
        assert torch.backends.cuda.matmul.allow_tf32 and num_threads == torch.get_num_threads()
        with FlopCounterMode(display=False) as counter:
            exec(products, globals)
        ran.append(counter.get_total_flops())
        return SimpleNamespace(blocked_autorange=lambda **_: SimpleNamespace(times=[1, 2, 4]))

    monkeypatch.setattr(benchmark, "Timer", timer)
    factor = torch.empty(size, size, device="meta")  # on a CPU the product would take seconds
    monkeypatch.setattr(torch, "randn", lambda *sizes, **_: factor.view(sizes))
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        rates = benchmark.matmul_rates(torch.device(device), None)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    flops = 2 * size**3
    rate = pytest.approx(flops / 1e9)
    assert waited == [(torch.device(device),)] * (device != "cpu")
    assert ran == [flops] and [rates[0], 2 * rates[1], 4 * rates[2]] == [rate] * 3


def test_a_process_of_its_own_is_prepared():
    """Asked there for its number and for cuDNN's search, which `devices.prepare` switches on."""
    what = "__import__('os').getpid(), __import__('torch').backends.cudnn.benchmark"
    number, search = benchmark.own_process(devices.prepare, eval, what)
    assert search and number != os.getpid()


def test_trainings_take_turns_and_only_ours_are_prepared_and_keep_memory(monkeypatch):
    turns = []

    def own_process(prepare, function, train, settings, images, **how):
        assert function is benchmark.epoch_speeds and how == {"device": CPU, "dtype": None}
        kept, search = [], False
        with torch.backends.cudnn.flags(enabled=True, benchmark=False), monkeypatch.context() as m:
            m.setattr(devices, "keep_memory", lambda: kept.append(True))
            if prepare:
                prepare()
            search = torch.backends.cudnn.benchmark
        turns.append((getattr(train, "func", train), bool(kept), search))
        return [float(len(turns))]

    monkeypatch.setattr(benchmark, "own_process", own_process)
    speeds = benchmark.training_speeds(None, epochs=3, device=CPU, dtype=None)
    once = [
        (benchmark.plain_training, False, False), (benchmark.run.train_plain, True, True),
        (benchmark.run.train_lightning, True, True), (benchmark.run.train_plain, False, True),
    ]
    assert turns == 2 * once
    assert speeds == {
        benchmark.PLAIN: [1, 5], benchmark.OURS: [2, 6], benchmark.LIGHTNING: [3, 7],
        benchmark.GIVEN_BACK: [4, 8],
    }


def test_both_ways_have_the_same_phases(small_network, monkeypatch):
    monkeypatch.setattr(benchmark, "CustomResNet", small)
    found = benchmark.step_phases(tiny_images(), device=CPU, batch_size=14)
    phases = {"input": 2, "forward": 2, "backward": 2, "optimizer": 2}
    assert {way: {phase: len(values) for phase, values in times.items()}
            for way, times in found.items()} == {"plain": phases, "ours": phases}


def test_phases_of_five_steps_after_the_first(monkeypatch):
    """Each look at the clock takes a second."""
    monkeypatch.setattr(benchmark.time, "perf_counter", itertools.count().__next__)
    batches = 7 * [(torch.zeros(4, 3, 8, 8), torch.arange(4))]
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert benchmark.phases(lambda _: (batches, model, optimizer), device=CPU) == {
        phase: 5 * [1000 / 4] for phase in ("input", "forward", "backward", "optimizer")
    }


def test_phases_are_measured_in_processes_of_their_own(monkeypatch):
    """A plain training's is not set up for speed."""
    monkeypatch.setattr(benchmark, "own_process", lambda *given, **how: (*given, how))
    how, phases, settings = {"device": CPU}, benchmark.phases, recipe("s10").scaled(batch_size=7)
    ours = {**how, "dtype": torch.bfloat16, "layout": torch.channels_last}
    assert benchmark.step_phases("images", **how, dtype=torch.bfloat16, batch_size=7) == {
        "plain": (None, phases, benchmark.plain_parts, settings, "images", how),
        "ours": (devices.prepare, phases, benchmark.our_parts, settings, "images", ours),
    }


def test_phases_of_the_picture_are_the_rows_of_the_table(measured, rows):
    assert measured[1] == {
        way: {
            phase: rows.loc[f"training, {way}: {phase}", "median"]
            for phase in ("input", "forward", "backward", "optimizer")
        }
        for way in ("plain", "ours")
    }


def test_plain_images_are_cropped_flipped_and_cut_out():
    image, label = benchmark.PlainDataset(benchmark.noise(3))[2]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 2
    assert (image == 0).all(0).sum() == 64


def test_command_writes_table_and_figure(measured, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda **_: measured)
    monkeypatch.setattr(benchmark.tables, "IMAGES", tmp_path)
    tables = []
    monkeypatch.setattr(benchmark.tables, "write", lambda: tables.append("README.md"))
    benchmark.main(["--device", "cpu", "--record"])
    written = files.read_table(tmp_path / "benchmark/speeds.csv")
    assert written["device"].unique() == [
        f"{devices.device_name(CPU)}, {devices.dtype_name(devices.amp_dtype(CPU))}"
    ]
    assert written.drop(columns="device").equals(table)
    assert (tmp_path / "benchmark/time_by_phase.png").read_bytes().startswith(b"\x89PNG")
    assert tables == ["README.md"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in table["what"])


@pytest.mark.parametrize("device, images", [("cpu", 3 * 512), ("meta", 50 * 512)])
def test_an_epoch_fills_an_accelerator_and_spares_a_cpu(device, images, monkeypatch):
    sizes = []

    def stop(**how):
        sizes.append(how["images"])
        raise InputError("measured")

    monkeypatch.setattr(benchmark, "measure", stop)
    monkeypatch.setattr(devices, "pick_device", torch.device)
    with pytest.raises(SystemExit, match="measured"):
        benchmark.main(["--device", device])
    assert sizes == [images]


@pytest.mark.parametrize("arguments, word", [
    (["--device", "nonsense"], "nonsense"), (["--repeats", "0"], "--repeats"),
])
def test_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(arguments)
    assert word in f"{caught.value.code} {capsys.readouterr().err}"

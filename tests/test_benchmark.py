"""The benchmark's counts against sums by hand, and that each ratio is that of its two rows."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from conftest import CPU, Small
from utils import devices, files, models
from utils.maintenance import benchmark


def small(num_classes=10):
    return Small(num_classes)


@pytest.fixture(scope="module")
def measured():
    """Measured with a small network, and at a made-up rate of matrix products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        patch.setattr(benchmark, "CustomResNet", small)
        patch.setattr(benchmark, "matmul_rates", lambda *_: [4e9, 5e9, 7e9])
        speeds = {True: [30.0, 40.0], False: [20.0, 25.0]}  # those of processes of their own
        patch.setattr(benchmark, "kept_speeds", lambda kept, *_, **__: speeds[kept])
        return benchmark.measure(device=CPU, images=8, batch_size=4, repeats=2)


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
    assert table["unit"].value_counts()[["images/s", "times", "ms/image"]].to_list() == [7, 5, 8]


@pytest.mark.parametrize("ratio, over, under", [
    ("whole batches over one image at a time", benchmark.BATCHED, benchmark.SINGLE),
    ("our training over plain", benchmark.OURS, benchmark.PLAIN),
    ("Lightning over our loop", benchmark.LIGHTNING, benchmark.OURS),
    ("freed memory kept over given back", benchmark.KEPT[True], benchmark.KEPT[False]),
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
    assert rows.loc["matrix product, float32", "median"] == 5


def test_rate_of_matrix_products(monkeypatch):
    """Large ones, on a device that has no numbers, which are said to take 1, 2 and 4 seconds."""
    timed = SimpleNamespace(blocked_autorange=lambda **_: SimpleNamespace(times=[1, 2, 4]))
    monkeypatch.setattr(benchmark, "Timer", lambda *_, **__: timed)
    rates = benchmark.matmul_rates(torch.device("meta"), torch.float32)
    assert rates == [2 * 8192**3, 8192**3, 8192**3 / 2]


def test_phases_of_five_steps_after_the_first(monkeypatch):
    """Each look at the clock takes a second."""
    monkeypatch.setattr(benchmark.time, "perf_counter", itertools.count().__next__)
    batches = 7 * [(torch.zeros(4, 3, 8, 8), torch.arange(4))]
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert benchmark.phases(batches, model, optimizer, device=CPU) == {
        phase: 5 * [1000 / 4] for phase in ("input", "forward", "backward", "optimizer")
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


@pytest.mark.parametrize("arguments, word", [
    (["--device", "nonsense"], "nonsense"), (["--images", "256"], "--images"),
    (["--repeats", "0"], "--repeats"),
])
def test_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(arguments)
    assert word in f"{caught.value.code} {capsys.readouterr().err}"

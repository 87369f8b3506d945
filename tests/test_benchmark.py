"""The benchmark's counts against sums by hand, and that each ratio is that of its two rows."""

import csv

import pytest
import torch
from torch import nn

from utils import benchmark

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    return {
        row["what"]: row
        for row in benchmark.measure(device=CPU, images=12, batch_size=4, repeats=1, workers=0)
    }


def test_flop_of_the_network():
    """Multiply-adds of each convolution by hand; the first needs no gradient of its input."""
    prep = 3 * 64 * 9 * 32**2
    others = (
        64 * 128 * 9 * 32**2 + 2 * 128 * 128 * 9 * 16**2 + 128 * 256 * 9 * 16**2
        + 256 * 512 * 9 * 8**2 + 2 * 512 * 512 * 9 * 4**2 + 512 * 10
    )
    assert benchmark.training_flops() == 2 * (2 * prep + 3 * others)


def test_rows_are_speeds_within_their_spread(rows):
    assert all(0 < row["lowest"] <= row["median"] <= row["highest"] for row in rows.values())
    units = [row["unit"] for row in rows.values()]
    assert units.count("ms/image") == 8 and units.count("MiB") == 2 and units.count("times") == 4


@pytest.mark.parametrize("ratio, over, under", [
    ("whole batches over one image at a time", benchmark.BATCHED, benchmark.SINGLE),
    ("our training over plain", benchmark.OURS, benchmark.PLAIN),
    ("Lightning over our loop", benchmark.LIGHTNING, benchmark.OURS),
])
def test_ratios_are_those_of_the_medians(rows, ratio, over, under):
    assert rows[ratio]["median"] == rows[over]["median"] / rows[under]["median"]


def test_share_of_the_matrix_product(rows):
    (*_, limit) = [row for row in rows.values() if row["unit"] == "GFLOP/s"]
    flops = rows[benchmark.OURS]["median"] * benchmark.training_flops()
    share = rows["our training over the matrix product"]["median"]
    assert share == pytest.approx(flops / (1e9 * limit["median"]), rel=1e-9)


def test_memory_counts_weights_gradients_state_and_what_is_kept():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10, bias=False), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.ones(4, 3, 32, 32)
    # weights, gradients and momentum; the images, and the result of ReLU
    assert benchmark.step_memory(model, optimizer, images) == 4 * (3 * 30720 + 4 * 3072 + 4 * 10)


def test_plain_images_are_cropped_flipped_and_cut_out():
    dataset = benchmark.PlainDataset(benchmark.noise(3))
    image, label = dataset[2]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 2
    assert ((image == 0).all(0)).sum() >= 64


def test_command_writes_table_and_figure(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda **_: list(rows.values()))
    table, figure = tmp_path / "speeds.csv", tmp_path / "time.png"
    monkeypatch.setattr("sys.argv", ["benchmark", "--csv", str(table), "--figure", str(figure)])
    benchmark.main()
    with open(table, newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["what"] for row in written] == list(rows)
    assert float(written[0]["median"]) == rows[written[0]["what"]]["median"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    shares = benchmark.phases_of(written)
    assert list(shares) == ["plain", "ours"]
    assert list(shares["ours"]) == ["input", "forward", "backward", "optimizer"]


@pytest.mark.parametrize("arguments, word", [
    (["--device", "nonsense"], "nonsense"), (["--images", "256"], "--images"),
    (["--repeats", "0"], "--repeats"),
])
def test_refused_in_one_line(arguments, word, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code.startswith("error: ") and word in caught.value.code
    assert "\n" not in caught.value.code

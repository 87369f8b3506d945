"""Which device and which precision, and training on the accelerator where there is one."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import CPU, cut_off_after, tiny_images
from utils import InputError, devices, run
from utils.recipes import recipe

CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "cpu:x", "meta"])
def test_a_device_that_is_not_there_is_named_in_one_line(name):
    with pytest.raises(InputError, match=f"^no device '{name}'[^\n]*$"):
        devices.pick_device(name)


def test_without_an_accelerator_the_best_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    assert devices.pick_device() == devices.pick_device("cpu") == CPU


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back at once"
)
def test_freed_memory_is_kept():
    """Of 400 MB that are filled and freed, twice, in a process of its own."""
    script = """
import resource, torch
from pathlib import Path
from utils import devices
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
def left():
    before = resident()
    tensor = torch.ones(100_000_000)
    del tensor
    return resident() - before
print(left())
devices.keep_memory()
print(left())
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ).stdout
    given_back, kept = map(float, output.split())
    assert given_back < 350 < kept


@pytest.mark.parametrize("keep", [False, True])
def test_a_process_that_trains_has_cudnn_search_and_keeps_memory_unless_told_not_to(
    keep, monkeypatch
):
    """The flag can be read without a GPU too."""
    kept = []
    monkeypatch.setattr(devices, "keep_memory", lambda: kept.append(True))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        devices.prepare(keep=keep)
        assert torch.backends.cudnn.benchmark and kept == [True] * keep


@pytest.mark.parametrize("abilities, dtype", [
    ({}, None),
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, None),
    ({"avx512_bf16": True}, torch.bfloat16),
    ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
])
def test_mixed_precision_on_a_cpu_that_multiplies_bfloat16(monkeypatch, abilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert devices.amp_dtype(CPU) is dtype


def test_mixed_precision_is_what_this_gpu_can_not_the_current_one(monkeypatch):
    capabilities = {0: (7, 5), 1: (8, 0), 2: (6, 1), 3: (7, 5)}
    names = "Tesla T4", "NVIDIA A100", "Tesla P4", "NVIDIA GeForce GTX 1660 Ti"  # no tensor cores
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: capabilities[device.index]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: names[device.index])
    dtypes = [devices.amp_dtype(torch.device("cuda", index)) for index in capabilities]
    assert dtypes == [torch.float16, torch.bfloat16, None, None]


def test_the_name_of_a_cpu_ends_with_its_threads():
    """As the README's table wants it."""
    assert re.fullmatch(r"\S.* CPU, [1-9]\d* thread\(s\)", devices.device_name(CPU))


@pytest.mark.parametrize("name, dtype", [
    ("auto", torch.bfloat16),  # what this CPU is made to want
    ("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16),
])
def test_precision(monkeypatch, name, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert devices.pick_precision(name, CPU) is dtype


@pytest.mark.parametrize("name, dtype", [
    pytest.param("cuda", torch.float16, marks=pytest.mark.skipif(
        not CUDA, reason="no CUDA device here")),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.skipif(
        not CUDA, reason="no CUDA device here")),
    pytest.param("mps", torch.float16, marks=pytest.mark.skipif(
        not MPS, reason="no MPS device here")),
])
def test_an_accelerator_trains_in_mixed_precision_and_resumes(name, dtype, tmp_path):
    how = {"device": torch.device(name), "dtype": dtype, "checkpoint": tmp_path / "checkpoint.pt"}
    settings = recipe("s10").scaled(epochs=2, batch_size=14).replace(padding=1, cutout=2)
    with cut_off_after(4):  # an epoch has three steps
        run.train_plain(settings, tiny_images(), **how)
    model, history = run.train_plain(settings, tiny_images(), resume=True, **how)
    assert [row["epoch"] for row in history] == [1, 2]
    for tensor in model.state_dict().values():
        assert tensor.device.type == name and tensor.isfinite().all()

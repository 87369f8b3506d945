"""The page: what it computes, what it answers over the network and in a browser, its export."""

import ast
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import Small
from utils import InputError, data, demo, explain, files, models, run
from utils.models import load_weights
from utils.recipes import recipe
from utils.results import Results, read_predictions

gradio = pytest.importorskip("gradio", reason="the page needs Gradio")
client = pytest.importorskip("gradio_client", reason="it comes with Gradio")


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of an untrained network that is sure of itself."""
    torch.manual_seed(0)
    model = Small(10).eval()
    model.fc.weight.data *= 20
    path = tmp_path_factory.mktemp("run") / "weights.safetensors"
    about = run.weights_metadata(recipe("s10"), data.load("sample"))
    files.save_weights(model, path, metadata=about)
    return path


@pytest.fixture(scope="module")
def model(weights):
    return load_weights(weights)


@pytest.fixture(scope="module")
def server(weights):
    blocks = demo.page(weights, "sample")
    blocks.launch(prevent_thread_lock=True, quiet=True)
    yield blocks
    blocks.close()

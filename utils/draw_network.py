"""Draws the network for the README and the notebooks: `python -m utils.draw_network`."""

import matplotlib.pyplot as plt
import torch

from utils import plotting
from utils.models import CustomResNet

OPERATIONS = {
    "prep": ["conv 3×3, 64", "BN, ReLU"],
    "layer1": ["conv 3×3, 128", "max-pool 2", "BN, ReLU", "+ residual: 2 × (conv 3×3, BN, ReLU)"],
    "layer2": ["conv 3×3, 256", "max-pool 2", "BN, ReLU"],
    "layer3": ["conv 3×3, 512", "max-pool 2", "BN, ReLU", "+ residual: 2 × (conv 3×3, BN, ReLU)"],
    "head": ["max-pool 4", "linear 512→10"],
}


def blocks():
    """What `plotting.network` draws; shapes and counts are taken from the model itself."""
    model = CustomResNet().eval()
    parts = {**dict(model.named_children()), "head": torch.nn.Sequential(
        model.pool, torch.nn.Flatten(), model.fc
    )}
    x = torch.zeros(1, 3, 32, 32)
    drawn = [{"name": "input", "operations": [], "shape": tuple(x.shape[1:]), "parameters": 0}]
    for name, operations in OPERATIONS.items():
        x = parts[name](x)
        drawn.append({
            "name": name.replace("layer", "layer "),
            "operations": operations,
            "shape": tuple(x.shape[1:]),
            "parameters": sum(p.numel() for p in parts[name].parameters()),
        })
    return drawn


if __name__ == "__main__":
    plotting.use_style()
    plotting.network(blocks())
    plt.savefig("images/custom_resnet.png")

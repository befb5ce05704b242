"""Reconstruct private images from the gradients of your own model, cell by cell.

Open it in an editor that knows `# %%` cells, or run it from the root: PYTHONPATH=. python examples/notebook.py
"""

# %% A model of any kind: it takes images (N, 3, 32, 32) with pixels in [0, 1] and returns logits (N, classes).
from pathlib import Path

import torch
from torch import nn

import data
from attacks import DLG, IGSingle
from evaluation.metrics import psnr
from evaluation.pairing import pair

ITERATIONS = 300
torch.manual_seed(0)
torch.set_num_threads(1)  # small networks are fastest on one


class TinyNet(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 5, stride=2, padding=2)
        self.second = nn.Conv2d(12, 12, 5, stride=2, padding=2)
        self.head = nn.Linear(12 * 8 * 8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))


photos = data.load("photos", base_datadir=Path("datasets"))  # 32x32 crops of photographs; nothing is downloaded
model = TinyNet(photos.task.num_classes)


# %% A client computes one gradient of its private images and sends it to the server.
def gradients_of(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), list(model.parameters()))


# %% The server reconstructs image and label. PSNR is in dB: from 20 on an image is recognised, 40 is nearly a copy.
image, label = photos.private.take(torch.tensor([0]))
for attack in (IGSingle(iterations=ITERATIONS), DLG(iterations=ITERATIONS)):
    result = attack(model, gradients_of(image, label), input_shape=(3, 32, 32))
    score = psnr(image[0], result.images[0])
    print(f"{attack.name}: {score:.1f} dB, label {result.labels.tolist()} of {label.tolist()}, {result.status}")

# %% Of a batch the server first infers which labels occur how often. Public images and granted labels are optional.
images, labels = photos.private.take(torch.arange(4) * (len(photos.private) // 4))
public = photos.public.take(torch.arange(256))
for name, extra in {"nothing": {}, "public images": {"public": public}, "labels": {"labels": labels}}.items():
    gradients = gradients_of(images, labels)
    result = IGSingle(iterations=ITERATIONS)(model, gradients, input_shape=(3, 32, 32), num_examples=4, **extra)
    scores = [psnr(x, result.images[j]) for x, j in zip(images, pair(images, result.images), strict=True)]
    print(f"4 images, {name} known: {sum(scores) / 4:.1f} dB, labels {sorted(result.labels.tolist())}", labels.tolist())

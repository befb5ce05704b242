"""The training side of the server: FedAvg (McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629).

It knows nothing of attacks: whoever attacks reads the same updates from the wire.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from federated.wire import Batch, Task, Update


def aggregate(model: nn.Module, updates: Sequence[Update]) -> None:
    """FedAvg, in place: W <- W - sum_k (n_k / n) delta_k, and the same weighted mean of the clients' buffers."""
    assert updates and all(u.kind == "delta" for u in updates), [u.kind for u in updates]
    total = sum(u.num_examples for u in updates)
    shares = [u.num_examples / total for u in updates]
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter -= sum(share * u.tensors[i] for share, u in zip(shares, updates, strict=True))
        for name, buffer in model.named_buffers():
            mean = sum(share * u.buffers[name].double() for share, u in zip(shares, updates, strict=True))
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())


def sample_clients(clients: int, per_round: int, rng: torch.Generator) -> list[int]:
    """The clients of one round, drawn without replacement, in ascending order."""
    return sorted(torch.randperm(clients, generator=rng)[:per_round].tolist())


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch, task: Task, chunk: int = 64) -> float:
    """Share of `batch` the model classifies right, in eval mode."""
    training = model.training
    model.eval()
    right = sum(
        (model(task.to_model(images)).argmax(1) == labels).sum().item()
        for images, labels in zip(batch.images.split(chunk), batch.labels.split(chunk), strict=True)
    )
    model.train(training)
    return right / len(batch.labels)


def pretrain(model: nn.Module, public: Batch, task: Task, epochs: int, rng: torch.Generator) -> None:
    """Train on public data before the federation starts, in place: Adam at 1e-3, batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = task.to_model(public.images)
    training = model.training
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        for _ in range(epochs):
            for indices in torch.randperm(len(inputs), generator=rng).split(64):
                if len(indices) < 2:  # BatchNorm has no variance over one image
                    continue
                loss = F.cross_entropy(model(inputs[indices]), public.labels[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.train(training)

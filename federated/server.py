"""The training side of the server: FedAvg (McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629).

It knows nothing of attacks: an attacker reads the same updates.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from core.protocol import Batch, Task, Update
from core.rng import seeded_global_rng


def aggregate(model: nn.Module, updates: Sequence[Update]) -> None:
    """FedAvg, in place: W <- W - sum_k (n_k / n) delta_k, and the same weighted mean of the clients' buffers."""
    assert updates and all(u.kind == "delta" for u in updates), [u.kind for u in updates]
    total = sum(u.num_examples for u in updates)
    shares = [u.num_examples / total for u in updates]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pairs = zip(shares, updates, strict=True)
            mean: torch.Tensor = sum(share * u.tensors[name] for share, u in pairs)  # type: ignore[assignment]
            parameter.sub_(mean)
        for name, buffer in model.named_buffers():
            pairs = zip(shares, updates, strict=True)
            mean = sum(share * u.buffers[name].double() for share, u in pairs)  # type: ignore[assignment]
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())


def sample_clients(clients: int, per_round: int, rng: torch.Generator) -> list[int]:
    """The clients of one round, drawn without replacement, in ascending order."""
    return sorted(torch.randperm(clients, generator=rng)[:per_round].tolist())


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch, task: Task, chunk: int = 64) -> float:
    """The share of `batch` that the model classifies correctly in eval mode."""
    training = model.training
    model.eval()
    correct = sum(
        (model(task.domain.to_model(examples)).argmax(1) == labels).sum().item()
        for examples, labels in zip(batch.examples.split(chunk), batch.labels.split(chunk), strict=True)
    )
    model.train(training)
    return correct / len(batch.labels)


def pretrain(
    model: nn.Module,
    public: Batch,
    task: Task,
    epochs: int,
    rng: torch.Generator,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> None:
    """Train on public data before the federation starts, in place: Adam at 1e-3, batches of 64.

    `on_step` is called with (steps done, steps in all, loss) after each step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = task.domain.to_model(public.examples)
    training = model.training
    model.train()
    step, total = 0, epochs * -(-len(inputs) // 64)
    with seeded_global_rng(rng):
        for _ in range(epochs):
            for indices in torch.randperm(len(inputs), generator=rng).split(64):
                step += 1
                if len(indices) < 2:  # BatchNorm has no variance over one example
                    continue
                loss = F.cross_entropy(model(inputs[indices]), public.labels[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                on_step(step, total, loss.item())
    model.train(training)

"""The training side of the server: FedAvg (McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629).

It knows nothing of attacks: an attacker reads the same updates.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from core.protocol import LOSSES, Batch, Recipe, Task, Update
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
def accuracy(model: nn.Module, batch: Batch, task: Task, chunk: int = 64, loss: str = "cross_entropy") -> float:
    """The share of `batch` that the model classifies correctly in eval mode; of a language model, of next tokens."""
    training = model.training
    model.eval()
    correct, count = 0, 0
    for examples, labels in zip(batch.examples.split(chunk), batch.labels.split(chunk), strict=True):
        inputs = task.domain.to_model(examples)
        right = model(inputs).argmax(1) == labels if loss != "next_token" else _next_right(model, inputs)
        correct, count = correct + int(right.sum()), count + right.numel()
    model.train(training)
    return correct / count


def _next_right(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids)[..., :-1].argmax(1) == ids[:, 1:]


def pretrain(
    model: nn.Module,
    public: Batch,
    task: Task,
    epochs: int,
    rng: torch.Generator,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
    loss_name: str = "cross_entropy",
) -> None:
    """Train on public data before the federation starts, in place: Adam at 1e-3, batches of 64.

    `on_step` is called with (steps done, steps in all, loss) after each step. `loss_name`: a name in `LOSSES`.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = task.domain.to_model(public.examples)
    targets = Recipe(batch_size=64, loss=loss_name).targets(inputs, public.labels)
    training = model.training
    model.train()
    step, total = 0, epochs * -(-len(inputs) // 64)
    with seeded_global_rng(rng):
        for _ in range(epochs):
            for indices in torch.randperm(len(inputs), generator=rng).split(64):
                step += 1
                if len(indices) < 2:  # BatchNorm has no variance over one example
                    continue
                loss = LOSSES[loss_name](model(inputs[indices]), targets[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                on_step(step, total, loss.item())
    model.train(training)

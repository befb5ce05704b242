"""A Flower federation whose server captures every update; docs/audit.md has the commands.

Each client holds two synthetic images of different classes and takes one full-batch step of SGD.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from core.protocol import image_task
from defenses.detect import synthetic_images
from federated.flower import capturing
from models import build

TASK, LR = image_task((3, 16, 16), 4), 0.1
client = ClientApp()
server = ServerApp()


def network() -> torch.nn.Module:
    return build("fc2", TASK.domain.shape, TASK.num_classes, rng=torch.Generator().manual_seed(0))


@client.train()
def train(message: Message, context: Context) -> Message:
    """One step on the two images of this node."""
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    place = 2 * int(context.node_config.get("partition-id", 0))
    images = TASK.domain.to_model(synthetic_images(TASK, place + 2)[place:])
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([place % 4, (place + 1) % 4]))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=LR).step()
    metrics = MetricRecord({"num-examples": 2, "loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    recipe = {"batch_size": 2, "local_epochs": 1, "lr": LR}
    folder = str(context.run_config["folder"])
    strategy = capturing(FedAvg(fraction_evaluate=0.0), folder, network(), input_shape=TASK.domain.shape, recipe=recipe)
    arrays = ArrayRecord(network().state_dict())
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(context.run_config["rounds"]))

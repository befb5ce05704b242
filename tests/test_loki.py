"""LOKI: the columns of a client hold its gradient alone, and an image that is alone in its bin is exact."""

import torch

from attacks import ATTACKS
from core.protocol import Batch, Observation, Recipe, Update, image_task
from core.rng import stream
from defenses.detect import detect, synthetic_images
from federated.client import gradient, train
from federated.simulation import summed
from models import build
from models.implants.slots import Slots

TASK = image_task((3, 8, 8), 4, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
PUBLIC = Batch(synthetic_images(TASK, 64), torch.arange(64) % 4)
CLIENTS, EACH = 3, 4
ATTACK = ATTACKS["loki"](bins=64, slots=CLIENTS)


def batches() -> list[Batch]:
    """Images of the clients; those of different clients have equal brightness, so that they share bins."""
    rng = torch.Generator().manual_seed(1)
    noise = 0.2 * (torch.rand(CLIENTS, EACH, 3, 8, 8, generator=rng) - 0.5)
    noise = noise - noise.mean((2, 3, 4), keepdim=True)
    levels = torch.tensor([0.3, 0.42, 0.55, 0.66]).view(1, EACH, 1, 1, 1)
    labels = torch.randint(4, (CLIENTS, EACH), generator=rng)
    return [Batch(*pair) for pair in zip(noise + levels, labels, strict=True)]


def updates(recipe: Recipe, kind: str) -> tuple[Slots, list[Update]]:
    model = ATTACK.implant(build("cnn", (3, 8, 8), 4, rng=stream(0, "model")), TASK, PUBLIC, recipe)
    sent = []
    for client, truth in enumerate(batches()):
        received, rng = ATTACK.personalize(model, client), torch.Generator().manual_seed(0)
        if kind == "gradient":
            sent.append(gradient(received, truth, TASK, recipe, rng))
        else:
            sent.append(train(received, truth, TASK, recipe, rng)[0])
    return model, sent


def test_every_client_computes_what_the_honest_model_computes_but_for_a_shift_in_brightness() -> None:
    model, _ = updates(Recipe(EACH), "gradient")
    x = TASK.domain.to_model(batches()[0].examples)
    outputs = torch.stack([model.for_client(k)(x) for k in range(CLIENTS)])
    torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0], model.inner(x), rtol=0.1, atol=0.02)


def test_the_columns_of_a_client_hold_its_gradient_alone() -> None:
    _, sent = updates(Recipe(EACH), "gradient")
    total = summed(sent).tensors["block.weight"].unflatten(1, (CLIENTS, -1))
    for k, own in enumerate(sent):
        columns = own.tensors["block.weight"].unflatten(1, (CLIENTS, -1))
        assert not columns[:, [j for j in range(CLIENTS) if j != k]].any()
        torch.testing.assert_close(CLIENTS * total[:, k], columns[:, k])


def test_images_of_all_clients_are_read_from_the_sum() -> None:
    """Up to the brightness, which is that of a bin where two clients share one."""
    for kind, recipe, least in (("gradient", Recipe(EACH), 1e-5), ("delta", Recipe(EACH, 2, lr=0.05), 1e-3)):
        model, sent = updates(recipe, kind)
        rec = ATTACK.reconstruct(Observation(TASK, recipe, model, summed(sent), aggregate=CLIENTS), torch.Generator())
        truth, found = (torch.cat([b.examples for b in batches()]).flatten(1), rec.examples.flatten(1))
        cosines = torch.nn.functional.cosine_similarity(truth[:, None], found[None], dim=2)
        best = cosines.max(1)
        assert (1 - best.values).max() < least, kind
        widest = (model.block.edges.diff() * CLIENTS)[:-1].max()
        assert (truth.mean(1) - found[best.indices].mean(1)).abs().max() <= widest


def test_a_client_finds_the_kernels() -> None:
    model, _ = updates(Recipe(EACH), "gradient")
    kinds = {sign.kind for sign in detect(model.for_client(1), TASK)}
    assert {"pass-through kernels", "imprint block"} <= kinds

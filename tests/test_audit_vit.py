"""The vision transformer of the zoo, and APRIL on it."""

import pytest
import torch

from attacks import ATTACKS
from core.errors import UsageError
from core.protocol import Batch, Observation, Recipe, image_task
from evaluation.metrics import psnr
from federated.client import gradient, train
from models import build
from models.validation import validate

TASK = image_task((1, 8, 8), 3, (0.4,), (0.3,))
RNG = torch.Generator().manual_seed(0)
BATCH = Batch(torch.rand(1, 1, 8, 8, generator=RNG), torch.tensor([2]))


def network(name: str) -> torch.nn.Module:
    return build(name, (1, 8, 8), 3, rng=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["gradient", "delta"])
@pytest.mark.parametrize("ridge", [0.0, 10.0])
def test_the_closed_form_is_exact_without_normalisation_before_attention(kind: str, ridge: float) -> None:
    model, rng = network("vit_plain"), torch.Generator()
    recipe = Recipe(1) if kind == "gradient" else Recipe(1, lr=1.0)
    update = (
        gradient(model, BATCH, TASK, recipe, rng) if kind == "gradient" else train(model, BATCH, TASK, recipe, rng)[0]
    )
    found = ATTACKS["april"](ridge=ridge).reconstruct(Observation(TASK, recipe, model, update), rng)
    assert found.labels.tolist() == [2]
    assert found.iterations == 0
    assert psnr(BATCH.examples[0], found.examples[0]) > 40


def test_the_closed_form_is_refused_where_it_does_not_hold() -> None:
    for name, n in (("vit", 1), ("vit_plain", 2)):
        with pytest.raises(UsageError, match="closed form for one example"):
            ATTACKS["april"](method="closed").check(network(name), TASK, Recipe(n), "gradient", n)
    with pytest.raises(UsageError, match="vision transformer"):
        ATTACKS["april"]().check(build("lenet", (1, 8, 8), 3), TASK, Recipe(1), "gradient", 1)


def test_the_matching_form_looks_at_the_position_embedding() -> None:
    """Its objective at the truth is zero, and elsewhere it is larger by the weighted cosine distance."""
    from attacks.april import PositionObjective
    from attacks.matching.matcher import GradientMatcher

    model = network("vit")
    update = gradient(model, BATCH, TASK, Recipe(1), torch.Generator())
    matcher = GradientMatcher(Observation(TASK, Recipe(1), model, update))
    index = [name for name, _ in model.named_parameters()].index("position")
    other = BATCH.examples.flip(3)
    plain, weighted = (PositionObjective(matcher, index, weight) for weight in (0.0, 2.0))
    assert weighted.distance(*BATCH).item() == pytest.approx(0, abs=1e-5)
    extra = weighted.distance(other, BATCH.labels) - plain.distance(other, BATCH.labels)
    ours, target = matcher.simulate(other, BATCH.labels)[index].flatten(), update.tensors["position"].flatten()
    assert extra.item() == pytest.approx(2 * (1 - torch.cosine_similarity(ours, target, dim=0)).item(), abs=1e-5)


def test_a_transformer_is_a_model_like_any_other() -> None:
    for name in ("vit", "vit_plain"):
        assert not validate(network(name), TASK).limits("labels", "gradients")

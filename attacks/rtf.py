"""Robbing the Fed. Fowl, Geiping, Czaja, Goldblum, Goldstein, ICLR 2022. https://arxiv.org/abs/2110.13057

    x = (dW_k - dW_{k+1}) / (db_k - db_{k+1})       for the image alone between thresholds c_k and c_{k+1}, dW_{K+1} = 0

With thresholds at the k/K quantiles of brightness, an image is alone with probability (1 - 1/K)^(n-1). Local training
breaks the division: float32 rounds b more coarsely than W, and at the published scale thresholds drift past each
other. Ours: a scale that bounds the drift (models/implants/calibration.py), and rows scaled by the brightness of their
bin instead. In front of a layer inside the network, rows give features, and images with these are searched for.

Ours, too: R neurons a bin, whose rows certify that a reconstruction is one image alone (linear/certificate.py).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attacks.base import register
from attacks.linear.bins import Decoder, scale_rows
from attacks.linear.certificate import ROUNDING, is_certain, main_direction
from attacks.linear.features import FeatureExtractor, FeatureInversionAttack, Head
from attacks.linear.layer import distinct, failed_reconstruction, plausible
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task
from core.rng import stream
from models.implants.calibration import Quantiles, calibrate, thresholds
from models.implants.imprint import Connection, FeatureImprint, Imprint, find_feature_imprint, find_imprint
from models.inspection import has_relu, pixel_layer


@register("rtf")
class RobbingTheFed(FeatureInversionAttack):
    """Robbing the Fed: an imprint block in front of the model, from whose rows images are read one by one."""

    citation = "Fowl et al.: Robbing the Fed. ICLR 2022"
    link = "https://arxiv.org/abs/2110.13057"
    threat = "malicious-architecture"
    uses = frozenset({"num_examples", "recipe"})
    kinds = frozenset({"continuous"})
    requires = frozenset({"public"})
    paper = {
        "bins": (100, "authors' notebook, n = 64"),
        "connection": ("linear", "authors' notebook"),
        "quantiles": ("official", "authors' notebook"),
        "threshold_drift": (0.0, "authors' notebook"),
        "decoder": ("bias", "authors' notebook"),
        "neurons": (1, "authors' notebook"),
    }
    returns_labels = False

    bins: int = hp(256, "number K of bins, which is the number of rows of the block", ge=2)
    connection: Connection = hp("addition", "connection of the block with the model, see models/implants/imprint.py")
    quantiles: Quantiles = hp(
        "smooth",
        "distribution whose quantiles are the thresholds: of public brightness, by kernel density (smooth), as it is "
        "(empirical) or fitted (normal, laplace); or the authors' Laplace(0, 0.71) (official)",
    )
    threshold_drift: float = hp(
        1e-5, "largest drift of thresholds per local step, in brightness; 0: the published scale", ge=0
    )
    brightness_shift: float = hp(
        1e-3, "mean brightness that the block adds to an image; without effect at the published scale", gt=0
    )
    decoder: Decoder = hp(
        "auto", "scale of a row: rows (middle of its bin), bias (division), or auto (bias where it is exact)"
    )
    sparse: bool = hp(False, "rows that respond between two thresholds only (a variant in the paper)")
    one_shot: bool = hp(
        False,
        "two rows only, at the limits of the middle one of K bins, in which one image in K is expected (a variant "
        "in the paper)",
    )
    position: Literal["input", "features"] = hp(
        "input", "place of the block: in front of the model, or of its first fully connected layer"
    )

    neurons: int = hp(
        3,
        "rows of a bin, whose rank certifies that a reconstruction is one image alone; 1: no certificate",
        ge=1,
        le=16,
    )
    direction: Literal["brightness", "random"] = hp(
        "brightness",
        "measure of the rows: brightness, or brightness after a random half of the pixels is inverted, which "
        "rotated and flipped copies of an image (OASIS) do not share",
    )

    def needs_workers(self) -> bool:
        return self.position != "input"

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        if self.position == "input":
            return
        if self.direction != "brightness":
            raise UsageError("`direction=random` inverts pixels, and features are none: choose `position=input`")
        if pixel_layer(model, task) is not None:
            raise UsageError(
                "rtf finds nothing in front of this model's first fully connected layer: choose `position=input`"
            )
        if not has_relu(model):
            raise UsageError(
                "rtf sorts features by a positive mean, and this model has no ReLU: choose `activation=relu`"
            )

    def prepare(self, task: Task, public: Batch, metadata: Mapping[str, Any]) -> None:
        brightness = public.examples.mean((1, 2, 3))
        if self.quantiles != "official" and len(brightness.unique()) < 2:
            raise UsageError(
                f"rtf places its thresholds by the brightness of public images, and the data set has {len(brightness)} "
                "of one brightness: use a data set with more images, or `quantiles=official`"
            )

    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        recipe = recipe or Recipe(batch_size=8)
        block = find_imprint(model)
        if self.position == "input":
            inner = block.inner if block else model
            if block is None:
                block = Imprint(inner, task, self.edges(public.examples), self.connection, self.sparse, self.neurons)
                if self.direction == "random":
                    chosen = torch.randint(2, block.inverted.shape, generator=stream("rtf", "direction"))
                    block.inverted.copy_(chosen)
            public = Batch(block.measured(public.examples), public.labels)
            edges = self.edges(public.examples)
            calibrate(block, inner, edges, public, recipe, self.threshold_drift, self.brightness_shift)
            return block
        layer = block.inner if block else next(m for m in model.modules() if isinstance(m, nn.Linear))
        extractor = FeatureExtractor(model, find_feature_imprint(model) or layer)
        features = extractor.in_chunks(task.domain.to_model(public.examples))  # (n, d)
        feature_task = block.task if block else FeatureImprint.feature_task(features, task)
        images = feature_task.domain.from_model(features.view(-1, *feature_task.domain.shape))
        inner = nn.Sequential(nn.Flatten(), Head(model, layer, task))
        edges = self.edges(images)
        if block is None:
            last = nn.Sequential(nn.Flatten(), layer)
            block = Imprint(last, feature_task, edges, self.connection, self.sparse, self.neurons)
            FeatureImprint.insert(model, layer, block)
        public = Batch(images, public.labels)
        calibrate(block, inner, edges, public, recipe, self.threshold_drift, self.brightness_shift)
        return model

    def edges(self, images: Tensor) -> Tensor:
        """Thresholds and the end of the last bin, from public images (n, C, H, W)."""
        edges, middle = thresholds(images.mean((1, 2, 3)), self.bins, self.quantiles), self.bins // 2
        return edges[[middle, middle + 1, -1]] if self.one_shot else edges

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        model, update = observation.model, observation.update
        block, feature_block = find_imprint(model), find_feature_imprint(model)
        if block is None:
            raise UsageError("rtf reads the update of a model that its own implant has prepared")
        first = next(i for i, p in enumerate(model.parameters()) if p is block.weight)
        rows_of = (len(block.patterns), len(block.edges) - 1)  # R, K
        weight, bias = (t.double().unflatten(0, rows_of) for t in update.ordered(model)[first : first + 2])
        noise = 2 * ROUNDING * weight.norm(dim=(0, 2))  # float32's rounding error of the difference of two similar rows
        if not block.sparse:
            weight = -weight.diff(dim=1, append=weight[:, :1] * 0)
            bias = -bias.diff(dim=1, append=bias[:, :1] * 0)
        main, second = main_direction(weight)
        weight, bias = torch.einsum("rk,rkn->kn", main, weight), (main * bias).sum(0)  # (K, N), (K,)
        low, high = block.edges[:-1].double(), block.edges[1:].double()
        if self.one_shot:
            weight, bias, low, high, noise, second = (t[:1] for t in (weight, bias, low, high, noise, second))
        is_delta = update.kind == "delta"
        rows = scale_rows(self.decoder, weight, bias, low, high, exact=not is_delta or block.connection == "split")
        size = weight.norm(dim=1)
        rounding = noise / 2
        if is_delta:
            largest = 2**-24 * block.weight.double().norm(dim=1).max()
            rounding = rounding + largest * (len(block.patterns) * observation.recipe.steps(update.num_examples)) ** 0.5
            noise = torch.maximum(largest, 1e-4 * size.max())
        certified = is_certain(second, size, rounding, float(block.resolution))
        images = rows.view(-1, *block.task.domain.shape)
        hit = (size > noise) & plausible(images, white=1.0 if feature_block is None else math.inf)
        order = hit.nonzero().flatten()
        order = order[size[order].argsort(descending=True)]
        # one gradient: each image is in one row, so similar rows are different images; after several steps an image is
        # in several rows
        order = order[distinct(images[order])] if is_delta else order
        found = images[order].clamp(min=0).float()
        if self.direction == "random":
            found = block.measured(found.clamp(max=1))
        if not len(order):
            return Reconstruction(failed_reconstruction(observation).examples, status="diverged")
        # behind "linear" the network sees only the brightness, and images of one bin and class have parallel d_i
        proofs = certified[order] if len(block.patterns) > 1 and block.connection != "linear" else None
        if feature_block is None:
            return Reconstruction(found.clamp(max=1), certified=proofs)
        features = block.task.domain.to_model(found).flatten(1)
        inverted = self.invert_features(FeatureExtractor(model, feature_block), features, observation.task, rng)
        trace = inverted.trace
        return Reconstruction(inverted.examples.float(), None, trace, len(trace), certified=proofs)

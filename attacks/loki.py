"""LOKI. Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi, IEEE S&P 2024. https://arxiv.org/abs/2303.12233

    x = dW_k[columns of client j] * (brightness of bin k) / (its mean)      for the image of client j alone in bin k

A convolution in front of an imprint block copies the image of client j into channels of its own: each client receives
other kernels. In a secure sum over clients, the columns of the block's weights that belong to these channels hold the
gradient of client j alone, as if there were no sum. Rows saturate at the next threshold, so that an image reaches one
row.

The gradient of the bias is shared by all clients. The authors divide by it; here a row is scaled by the brightness of
its bin, and the quotient only says where in the bin, if another client does not disturb it. Scale and thresholds are
those of our rtf: they bound the drift of thresholds in local steps.
"""

import torch
from torch import Tensor, nn

from attacks.base import Attack, register
from attacks.linear.layer import distinct, failed_reconstruction, plausible
from core.errors import UsageError
from core.hyperparameters import hp
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task
from models.implants.calibration import calibrate, thresholds
from models.implants.slots import SCALE, Slots

CALIBRATION = 256  # public images on which the scale is measured


@register("loki")
class Loki(Attack):
    """LOKI: an imprint block with channels of its own for each client, which undoes secure aggregation."""

    citation = "Zhao et al.: LOKI, Large-scale Data Reconstruction Attack against FL. S&P 2024"
    link = "https://arxiv.org/abs/2303.12233"
    threat = "malicious-architecture"
    uses = frozenset({"num_examples", "recipe"})
    kinds = frozenset({"continuous"})
    requires = frozenset({"public"})
    returns_labels = False

    bins: int = hp(256, "number of bins, which is the number of rows of the block", smoke=16, ge=2)
    slots: int = hp(10, "number of places for clients; of more clients, several share one", smoke=2, ge=1)
    threshold_drift: float = hp(1e-5, "largest drift of thresholds per local step, in brightness", gt=0)
    brightness_shift: float = hp(1e-3, "mean brightness that the block adds to an image", gt=0)

    def needs_workers(self) -> bool:
        return False

    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        brightness = public.examples.mean((1, 2, 3))
        if len(brightness.unique()) < 2:
            raise UsageError("loki places its thresholds by the brightness of public images, and all have the same")
        edges = thresholds(brightness, self.bins, "smooth")
        block = model if isinstance(model, Slots) else Slots(model, task, edges, self.slots)
        block.assign(0)
        few = public.examples[:: max(1, len(public.examples) // CALIBRATION)]
        labels = public.labels[:: max(1, len(public.labels) // CALIBRATION)]
        calibrate(
            block.block,
            block.block.inner,
            edges / block.clients,
            Batch(block.pixels(few), labels),
            recipe or Recipe(batch_size=8),
            self.threshold_drift / block.clients,
            self.brightness_shift * SCALE / block.clients,
        )
        return block

    def personalize(self, model: nn.Module, client: int) -> nn.Module:
        assert isinstance(model, Slots), type(model)
        return model.for_client(client)

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        slots, update = observation.model, observation.update
        if not isinstance(slots, Slots):
            raise UsageError("loki reads the update of a model that its own implant has prepared")
        names = {id(p): name for name, p in slots.named_parameters()}
        weight, bias = (update.tensors[names[id(p)]].double() for p in (slots.block.weight, slots.block.bias))
        columns = weight.view(len(weight), slots.clients, -1)  # (bins, K, C*H*W)
        found = [self.images_of(columns[:, k], bias, slots, update.kind) for k in range(slots.clients)]
        images = torch.cat(found)
        return Reconstruction(images.float()) if len(images) else failed_reconstruction(observation)

    def images_of(self, rows: Tensor, bias: Tensor, slots: Slots, kind: str) -> Tensor:
        """The images (M, C, H, W) of one client, from its columns (bins, C*H*W) and the shared bias gradient."""
        edges = slots.block.edges.double() * slots.clients
        low, high = edges[:-1].clamp(min=0), edges[1:]
        means, size = rows.mean(1), rows.norm(dim=1)
        noise = torch.zeros(())
        if kind == "delta":
            rounding = 2**-24 * slots.block.weight.double().norm(dim=1).max() / slots.clients**0.5
            noise = torch.maximum(rounding, 1e-3 * size.max())
        brightness = (low + high) / 2
        if kind == "gradient":
            brightness = torch.clamp(means / bias, low, high.clamp(max=1)).nan_to_num()
        images = (rows * (brightness / means)[:, None]).view(-1, *slots.task.domain.shape)
        hit = ((size > noise) & plausible(images)).nonzero().flatten()
        hit = hit[size[hit].argsort(descending=True)]
        hit = hit[distinct(images[hit])] if kind == "delta" else hit
        return images[hit].clamp(0, 1)

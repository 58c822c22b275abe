"""The plain way of each prompt method's training step, as its sheet writes it: one class per method.

Every text row has 77 tokens (82 where MMRL inserted its own), in every block. Image features of frozen encoders, the
teachers' included, are computed in every step. Only what the reference implementations compute once is given: the
features of hand-written prompts ("anchors"). Numbers are fp32, trained tensors are those of our method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.methods.prompts._layout import open_image, open_text, placeholder
from adaptkit.methods.prompts.prograd import FROM_TEMPLATE
from benchmarks.speed.plain import Edit, inserting, linear, norm, plain_image, plain_image_tokens, plain_text, replacing

Gradients = tuple[Tensor, ...]


class Step(NamedTuple):
    """What a step gives: logits [batch, classes], the loss [], and the gradient of each trained tensor."""

    logits: Tensor
    loss: Tensor
    gradients: Gradients


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


def deeper(prompts: Sequence[Tensor]) -> dict[int, Tensor]:
    """Prompts of layers 1, 2, … by layer, without those of layer 0."""
    return dict(enumerate(prompts[1:], start=1))


class Plain:
    """A method's step, forward, loss and backward, on given images.

    A method fills in `images`, `texts` and `losses`; the last two see the outputs of the first, so that a step can
    also be computed with the activations of a few classes at a time in memory, where the whole doesn't fit.

    Args:
        method: Whose trained tensors, settings and anchors it takes.
        pixels: [batch, 3, size, size].
        labels: int64 [batch].
    """

    apart = False
    """Whether images go through one at a time, each with its own backward pass."""

    def __init__(self, method: Any, pixels: Tensor, labels: Tensor) -> None:
        self.method, self.config = method, method.config
        self.pixels, self.labels = pixels, labels
        self.scale = method.backbone.logit_scale
        self.backbone, self.text = open_text(method.backbone, "The benchmark")
        self.image = open_image(method.backbone, "The benchmark")
        names = [name.replace("_", " ") for name in method.class_names]
        tokens = self.backbone.tokenize([self.prompt().format(name) for name in names])
        self.ids, self.ends = tokens.ids, tokens.ends  # [classes, 77], [classes]
        self.trained = [p for p in method.parameters() if p.requires_grad]

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def prompt(self) -> str:
        """The prompt that is tokenised, with "{}" for the class name; words stand where context vectors go."""
        return f"{self.config.context_init} {{}}."

    def images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What the image side gives, the features [batch, dim] first. Here those of the frozen encoder."""
        return (self.frozen(pixels),)

    def texts(self, rows: slice, images: tuple[Tensor, ...]) -> Tensor:
        """Unnormalised text features [classes, dim] of some rows. Here with a context at tokens 1 … M."""
        return plain_text(self.text, self.ids[rows], self.ends[rows], self.method.context)

    def losses(self, images: tuple[Tensor, ...], texts: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the losses that are differentiated one by one."""
        logits = self.logits(images[0], texts)
        return logits, [F.cross_entropy(logits, labels)]

    def combine(self, gradients: list[Gradients]) -> Gradients:
        """The gradient that the optimiser gets, from those of the losses."""
        (only,) = gradients
        return only

    @staticmethod
    def our_logits(method: Any, inputs: Tensor) -> Tensor:
        """Our method's logits, as `losses` gives them here."""
        logits: Tensor = method(inputs)
        return logits

    # --- what every method has ----------------------------------------------------------------------------------------

    def frozen(self, pixels: Tensor) -> Tensor:
        """The frozen image encoder's features [batch, dim]."""
        with torch.no_grad():
            return plain_image(self.image, pixels)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """[batch, classes]."""
        return self.scale * unit(images) @ unit(texts).T

    def step(self, piece: int | None = None) -> Step:
        """One step; `piece` says of how many classes the activations are held at a time (all by default)."""
        size = 1 if self.apart else len(self.labels)
        parts = list(zip(self.pixels.split(size), self.labels.split(size), strict=True))
        done = [self._part(pixels, labels, piece or len(self.ids)) for pixels, labels in parts]
        return Step(
            torch.cat([part.logits for part in done]),
            torch.stack([part.loss for part in done]).mean(),
            tuple(torch.stack(each).mean(dim=0) for each in zip(*(part.gradients for part in done), strict=True)),
        )

    def _part(self, pixels: Tensor, labels: Tensor, piece: int) -> Step:
        images = self.images(pixels)
        if piece >= len(self.ids):
            logits, losses = self.losses(images, self.texts(slice(None), images), labels)
            last = len(losses) - 1
            found = [
                torch.autograd.grad(loss, self.trained, retain_graph=index < last) for index, loss in enumerate(losses)
            ]
        else:
            logits, losses, found = self._in_pieces(images, labels, piece)
        return Step(logits.detach(), torch.stack(losses).sum().detach(), self.combine(found))

    def _in_pieces(
        self, images: tuple[Tensor, ...], labels: Tensor, piece: int
    ) -> tuple[Tensor, list[Tensor], list[Gradients]]:
        """The same numbers: the losses' gradient in the text features first, then that of the features, by piece."""
        pieces = [slice(start, start + piece) for start in range(0, len(self.ids), piece)]
        with torch.no_grad():
            texts = torch.cat([self.texts(rows, images) for rows in pieces])
        texts.requires_grad_()
        logits, losses = self.losses(images, texts, labels)
        of_texts, totals = [], []
        for loss in losses:
            first, *direct = torch.autograd.grad(loss, [texts, *self.trained], retain_graph=True, allow_unused=True)
            of_texts.append(first)
            totals.append(direct)
        for rows in pieces:
            features = self.texts(rows, images)
            for index, behind in enumerate(of_texts):
                found = torch.autograd.grad(features, self.trained, behind[rows], retain_graph=True, allow_unused=True)
                totals[index] = [_add(total, more) for total, more in zip(totals[index], found, strict=True)]
        return logits, losses, [tuple(total) for total in totals]


def _add(total: Tensor | None, more: Tensor | None) -> Any:
    return more if total is None else total if more is None else total + more


# --- contexts in front of the class name ------------------------------------------------------------------------------


class PlainCoOp(Plain):
    """z = τ · f̂ · ŵ; the context is random, placeholders stand for it."""

    def prompt(self) -> str:
        return f"{placeholder(self.backbone, self.config.num_context)} {{}}."


class PlainKgCoOp(Plain):
    """CE + λ · (1 - mean cosine of learned and hand-written text features)."""

    def __init__(self, method: Any, pixels: Tensor, labels: Tensor) -> None:
        super().__init__(method, pixels, labels)
        self.anchors = method.zero_shot()  # [classes, dim]

    def losses(self, images: tuple[Tensor, ...], texts: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = self.logits(images[0], texts)
        cosine = F.cosine_similarity(texts, self.anchors, dim=-1)  # [classes]
        return logits, [F.cross_entropy(logits, labels) + self.config.weight * (1 - cosine.mean())]


class PlainProGrad(Plain):
    """Two losses with a backward pass each; what contradicts the teacher is taken out of the first's gradient."""

    def __init__(self, method: Any, pixels: Tensor, labels: Tensor) -> None:
        super().__init__(method, pixels, labels)
        self.anchors = method.zero_shot()

    def prompt(self) -> str:
        words = self.config.context_init
        if words == FROM_TEMPLATE:  # templates without a hint alone: those of the benchmark
            words = self.method.templates[0].partition("{}")[0].strip()
        missing = self.config.num_context - len(words.split())
        return f"{placeholder(self.backbone, missing)} {words} {{}}." if missing else f"{words} {{}}."

    def images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.frozen(pixels), self.frozen(pixels)  # the teacher is a model of its own

    def losses(self, images: tuple[Tensor, ...], texts: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        student, teacher = images
        logits, temperature = self.logits(student, texts), self.config.temperature
        wanted = (self.logits(teacher, self.anchors) / temperature).softmax(dim=-1)
        distillation = -(wanted * (logits / temperature).log_softmax(dim=-1)).sum(dim=-1).mean() * temperature**2
        return logits, [F.cross_entropy(logits, labels), distillation]

    def combine(self, gradients: list[Gradients]) -> Gradients:
        return tuple(self._projected(own, teacher) for own, teacher in zip(*gradients, strict=True))

    def _projected(self, own: Tensor, teacher: Tensor) -> Tensor:
        direction = teacher / teacher.norm()
        along = (own * direction).sum()
        return own - self.config.projection * along * direction if float(along) < 0 else own


class PlainCoCoOp(Plain):
    """The context is shifted by a small network's answer to the image, so every image has texts of its own."""

    apart = True

    def images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (unit(self.frozen(pixels)),)

    def texts(self, rows: slice, images: tuple[Tensor, ...]) -> Tensor:
        first, second = self.method.meta_net.linear1, self.method.meta_net.linear2
        hidden = F.linear(images[0], first.weight, first.bias).relu()  # [1, dim / 16]
        shift = F.linear(hidden, second.weight, second.bias)  # [1, text width]
        return plain_text(self.text, self.ids[rows], self.ends[rows], self.method.context + shift)


# --- deep prompts in both towers --------------------------------------------------------------------------------------


class PlainDeep(Plain):
    """IVLP: prompts of their own for the first layers of both towers."""

    def text_prompts(self) -> Sequence[Tensor]:
        """[M, text width] by layer."""
        return list(self.method.text_prompts)

    def image_prompts(self) -> Sequence[Tensor]:
        """[M, image width] by layer."""
        return list(self.method.image_prompts)

    def images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        prompts = self.image_prompts()
        edit = replacing(deeper(prompts), start=-len(prompts[0]))
        return (plain_image(self.image, pixels, prompts[0], edit),)

    def texts(self, rows: slice, images: tuple[Tensor, ...]) -> Tensor:
        prompts = self.text_prompts()
        edit = replacing(deeper(prompts), start=1)
        return plain_text(self.text, self.ids[rows], self.ends[rows], prompts[0], edit=edit)


class PlainMaPLe(PlainDeep):
    """Image prompts are linear images of the text prompts."""

    def text_prompts(self) -> Sequence[Tensor]:
        return list(self.method.contexts)

    def image_prompts(self) -> Sequence[Tensor]:
        pairs = zip(self.method.contexts, self.method.couplings, strict=True)
        return [F.linear(context, coupling.weight, coupling.bias) for context, coupling in pairs]


class PlainPromptSRC(PlainDeep):
    """IVLP that is held near the frozen model: its texts, its images, and its logits."""

    def __init__(self, method: Any, pixels: Tensor, labels: Tensor) -> None:
        super().__init__(method, pixels, labels)
        self.anchors = method.text_anchors()  # [classes, dim]

    def images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (*super().images(pixels), self.frozen(pixels))

    def losses(self, images: tuple[Tensor, ...], texts: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        prompted, frozen = images
        logits = self.logits(prompted, texts)
        near_texts = (unit(texts) - self.anchors).abs().mean()
        near_images = (unit(prompted) - unit(frozen)).abs().mean()
        theirs = self.logits(frozen, self.anchors).log_softmax(dim=-1)
        divergence = (theirs.exp() * (theirs - logits.log_softmax(dim=-1))).mean()  # over batch and classes
        regularised = self.config.text_weight * near_texts + self.config.image_weight * near_images + divergence
        return logits, [F.cross_entropy(logits, labels) + regularised]


# --- representation tokens --------------------------------------------------------------------------------------------


class PlainMMRL(Plain):
    """Tokens of both towers' upper layers come from one space; a second image feature is read from them."""

    def __init__(self, method: Any, pixels: Tensor, labels: Tensor) -> None:
        super().__init__(method, pixels, labels)
        self.anchors = method.zero_shot()

    def prompt(self) -> str:
        (template,) = self.method.templates
        return str(template)

    def weights(self, maps: Any) -> list[tuple[Tensor, Tensor]]:
        """Weight [width of the tower, width of the space] and bias of each layer's map."""
        return [(each.weight, each.bias) for each in maps]

    def share(self) -> float:
        """Of the new tokens, in those before every further layer."""
        return 1.0

    def projection(self) -> Tensor:
        """[image width, dim], of the second image feature."""
        projection: Tensor = self.method.projection
        return projection

    def edit(self, maps: Any, layers: int) -> Edit:
        """Tokens [K, width] in the last layers of a tower, as many as there are maps."""
        tokens = [F.linear(self.method.tokens, weight, bias) for weight, bias in self.weights(maps)]
        return inserting(dict(enumerate(tokens, start=layers - len(tokens))), self.share())

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.config.scale * unit(images) @ unit(texts).T

    def images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        edit = self.edit(self.method.image_maps, self.image.layers)
        x = plain_image_tokens(self.image, pixels, edit=edit)[:, : 1 + self.config.num_tokens]
        x = norm(self.image.ln_post, x)
        return linear(self.image.projection, x[:, 0]), x[:, 1:].mean(dim=1) @ self.projection(), self.frozen(pixels)

    def texts(self, rows: slice, images: tuple[Tensor, ...]) -> Tensor:
        edit = self.edit(self.method.text_maps, self.text.layers)
        return plain_text(self.text, self.ids[rows], self.ends[rows], edit=edit)

    def losses(self, images: tuple[Tensor, ...], texts: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        of_class, of_tokens, frozen = images
        alpha, weight = self.config.alpha, self.config.consistency_weight
        logits, others = self.logits(of_class, texts), self.logits(of_tokens, texts)
        loss = alpha * F.cross_entropy(logits, labels) + (1 - alpha) * F.cross_entropy(others, labels)
        loss = loss + weight * (1 - F.cosine_similarity(of_class, frozen, dim=-1).mean())
        loss = loss + weight * (1 - F.cosine_similarity(texts, self.anchors, dim=-1).mean())
        return torch.cat([logits, others], dim=1), [loss]

    @staticmethod
    def our_logits(method: Any, inputs: Tensor) -> Tensor:
        branches = method.branch_logits(inputs)
        return torch.cat([branches["class"], branches["representation"]], dim=1)


class PlainMMRLpp(PlainMMRL):
    """One shared map per tower with a low-rank residual per layer, blended tokens, and a residual on the projection."""

    def weights(self, maps: Any) -> list[tuple[Tensor, Tensor]]:
        parts = zip(maps.left, maps.right, maps.bias, strict=True)
        return [(maps.weight + left @ right, bias) for left, right, bias in parts]

    def share(self) -> float:
        return float(self.config.beta)

    def projection(self) -> Tensor:
        frozen: Tensor = self.image.projection.get_parameter("weight").T
        return frozen + self.method.projection_left @ self.method.projection_right

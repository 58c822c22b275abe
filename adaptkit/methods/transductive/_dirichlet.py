"""Dirichlet mixtures over zero-shot probabilities, as EM-Dirichlet and UNEM fit them: likelihood, MM update, EM steps.

All in float64: differences of log-gammas lose digits where concentrations are large. A class k has concentrations
alpha_k [classes]; the likelihood is one product of matrices, so nothing of size images × classes × classes exists, and
a batch goes through in chunks: an EM step needs only its sums.

Source: arXiv 2405.18437, Sec. 4; em_dirichlet sheet; arXiv 2412.16739; unem sheet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

EPS = 1e-15
"""Added to probabilities before logarithms; classes of less mass count as empty."""

MM_STEPS = 1000
MM_CHECK = 50
MM_TOLERANCE = 1e-11

NEWTON_STEPS = 60
NEWTON_TOLERANCE = 1e-16
NEWTON_NEAR = 1e-8
NEWTON_LARGEST = 1000.0
"""Newton steps end where concentrations sum to this many times the number of classes: of one image, or of equal ones,
the likelihood has no maximum, and the MM update, which climbs by about classes / 4 a step, is ended by its steps."""

Solver = Literal["newton", "mm"]


def log_probabilities(cosines: Tensor, temperature: Tensor | float) -> Tensor:
    """log(softmax(temperature · cosines) + eps) over classes, float64 [..., images, classes]."""
    return torch.log(torch.softmax(temperature * cosines.double(), dim=-1) + EPS)


def log_likelihood(alpha: Tensor, log_z: Tensor) -> Tensor:
    """Dirichlet log-densities [..., images, classes].

    Args:
        alpha: Concentrations [..., classes, classes], a class a row.
        log_z: Log-probabilities [..., images, classes].
    """
    constant = torch.lgamma(alpha.sum(dim=-1)) - torch.lgamma(alpha).sum(dim=-1)  # [..., classes]
    return constant.unsqueeze(-2) + log_z @ (alpha - 1).transpose(-1, -2)


def mm_step(alpha: Tensor, y: Tensor) -> Tensor:
    """One majorise-minimise update of concentrations [..., rows, classes], all entries in parallel.

    Increases, for each row, the mean log-likelihood lnGamma(sum a) - sum lnGamma(a) + (a - 1) · y.

    Args:
        alpha: Positive.
        y: Mean log-probabilities, of the same shape.
    """
    digamma = torch.digamma(alpha + 1)
    curve = (2 * (alpha * digamma - torch.lgamma(alpha + 1)) / alpha.square().clamp_min(1e-300)).abs()
    curve = torch.where(alpha > 1e-11, curve, torch.pi**2 / 6)
    b = digamma - torch.digamma(alpha.sum(dim=-1, keepdim=True)) - curve * alpha - y
    root = (b.square() + 4 * curve).sqrt()
    # the positive root of curve·x² + b·x - 1, without a difference of near-equal numbers
    return torch.where(b > 0, 2 / (root + b.abs()), (root - b) / (2 * curve))


def maximise(alpha: Tensor, y: Tensor, steps: int = MM_STEPS) -> Tensor:
    """Concentrations [rows, classes] or [tasks, rows, classes] after MM steps from `alpha`.

    Every 50 steps the tasks stop whose squared relative change in one step is below 1e-11 (the reference measures it
    over a whole batch of tasks, so that results depend on the batch).
    """
    if alpha.dim() == 2:
        return maximise(alpha[None], y[None], steps)[0]
    out = alpha.clone()
    running = torch.arange(len(alpha), device=alpha.device)
    current, target = alpha, y
    for step in range(1, steps + 1):
        new = mm_step(current, target)
        if step % MM_CHECK == 0 or step == steps:
            change = (new - current).square().sum(dim=(1, 2)) / current.square().sum(dim=(1, 2))
            done = change < MM_TOLERANCE
            if step == steps:
                done = torch.ones_like(done)
            out = out.index_copy(0, running[done], new[done])
            running, new, target = running[~done], new[~done], target[~done]
            if not len(running):
                break
        current = new
    return out


def newton_step(alpha: Tensor, y: Tensor) -> Tensor:
    """The Newton update of concentrations [..., rows, classes], which may leave the positive numbers."""
    total = alpha.sum(dim=-1, keepdim=True)
    gradient = torch.digamma(total) - torch.digamma(alpha) + y
    return alpha + _solve(alpha, total, gradient)


def _solve(alpha: Tensor, total: Tensor, right: Tensor) -> Tensor:
    """(diag(psi'(alpha)) - psi'(total) 1 1ᵀ)⁻¹ right, in each row: the inverse is a diagonal and a rank-one term."""
    inverse = 1 / torch.special.polygamma(1, alpha)
    common = torch.special.polygamma(1, total)
    rest = (1 - common * inverse.sum(dim=-1, keepdim=True)).clamp_min(1e-12)  # above 0, but for rounding
    return inverse * (right + common * (inverse * right).sum(dim=-1, keepdim=True) / rest)


def row_objective(alpha: Tensor, y: Tensor) -> Tensor:
    """Mean log-likelihood of each row's members, [..., rows]."""
    return torch.lgamma(alpha.sum(dim=-1)) - torch.lgamma(alpha).sum(dim=-1) + ((alpha - 1) * y).sum(dim=-1)


def climb(alpha: Tensor, y: Tensor) -> Tensor:
    """The maximum that `maximise` approaches, in a few Newton steps; an MM update wherever that is the better step.

    Rows are independent of each other, so each stops by itself.
    """
    shape, classes = alpha.shape, alpha.shape[-1]
    out, target = alpha.reshape(-1, classes).clone(), y.reshape(-1, classes)
    running, current = torch.arange(len(out), device=out.device), out
    for _ in range(NEWTON_STEPS):
        safe, fast = mm_step(current, target), newton_step(current, target)
        allowed = (fast > 0).all(dim=1) & (fast.sum(dim=1) <= NEWTON_LARGEST * classes)
        size = current.square().sum(dim=1)
        # close to the maximum, rounding would decide which of the two is higher, and Newton steps are exact
        near = (fast - current).square().sum(dim=1) <= NEWTON_NEAR * size
        higher = row_objective(fast.clamp_min(1e-300), target) >= row_objective(safe, target)
        better = allowed & (near | higher)
        new = torch.where(better[:, None], fast, safe)
        done = (new - current).square().sum(dim=1) <= NEWTON_TOLERANCE * size
        out = out.index_copy(0, running, new)
        running, current, target = running[~done], new[~done], target[~done]
        if not len(running):
            break
    return out.reshape(shape)


def solve(alpha: Tensor, y: Tensor, solver: Solver) -> Tensor:
    """Concentrations that maximise the likelihood, from `alpha`, by either solver."""
    return climb(alpha, y) if solver == "newton" else maximise(alpha, y)


class ImplicitMaximum(torch.autograd.Function):
    """`maximise` with the gradient of its fixed point, whose memory doesn't grow with the steps.

    At the fixed point psi(sum a) - psi(a) + y = 0 in each row, so d alpha = (diag(psi'(a)) - psi'(sum a) 1 1ᵀ)⁻¹ dy.
    The start has no influence on the fixed point, so it gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, y: Tensor, solver: Solver) -> Tensor:
        out = solve(alpha.detach(), y.detach(), solver)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (alpha,) = ctx.saved_tensors
        return None, _solve(alpha, alpha.sum(dim=-1, keepdim=True), grads[0]), None


def implicit_maximum(alpha: Tensor, y: Tensor, solver: Solver = "newton") -> Tensor:
    """`solve`, differentiable with respect to `y` by the fixed point."""
    out: Tensor = ImplicitMaximum.apply(alpha, y, solver)
    return out


@dataclass(frozen=True)
class Layer:
    """One EM iteration's weights.

    Args:
        balance: Weight of the class-proportion term (lambda / images).
        temperature: Divides the assignment's logits.
    """

    balance: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Fitted:
    """What EM gives.

    Args:
        log_u: Log-assignments of images to clusters, fp32 [images, classes].
        prototypes: Mean probabilities [clusters, classes] of each cluster's members; zero for empty clusters.
        members: Images whose largest assignment is the cluster, int64 [clusters].
        alpha: Concentrations, float64 [classes, classes].
        v: Dual of the class proportions, float64 [classes].
    """

    log_u: Tensor
    prototypes: Tensor
    members: Tensor
    alpha: Tensor
    v: Tensor


class DirichletMixture:
    """EM on one batch of any size, in chunks.

    Args:
        chunks: Unit image features [rows, dim], in parts.
        text: Unit class weights [classes, dim].
        temperature: Of the probabilities that are all it sees.
        support: Unit features [shots, dim] with one-hot labels [shots, classes]; None for zero-shot.
        hard: Whether each image goes to one cluster between the iterations.
        solver: How the concentrations are found.
    """

    def __init__(
        self,
        chunks: Sequence[Tensor],
        text: Tensor,
        temperature: float,
        support: tuple[Tensor, Tensor] | None = None,
        hard: bool = False,
        solver: Solver = "newton",
    ) -> None:
        self._solver = solver
        self._chunks, self._text, self._temperature, self._hard = chunks, text.double(), temperature, hard
        self._kept = log_probabilities(chunks[0].double() @ self._text.T, temperature) if len(chunks) == 1 else None
        self.images, self.classes = sum(map(len, chunks)), len(text)
        self._support_mass = self._text.new_zeros(self.classes)
        self._support_sums = self._text.new_zeros(self.classes, self.classes)
        if support is not None:
            features, one_hot = support
            self._support_mass = one_hot.sum(dim=0)
            self._support_sums = one_hot.T @ log_probabilities(features.double() @ self._text.T, temperature)

    def _log_z(self) -> Iterator[Tensor]:
        if self._kept is not None:
            yield self._kept
            return
        for part in self._chunks:
            yield log_probabilities(part.double() @ self._text.T, self._temperature)

    def run(self, layers: Sequence[Layer]) -> Fitted:
        """The mixture after as many iterations as there are layers (at least one)."""
        alpha = torch.ones_like(self._support_sums)
        v = torch.zeros_like(self._support_mass)
        mass, sums = torch.zeros_like(v), torch.zeros_like(alpha)
        for log_z in self._log_z():  # the first assignments are the probabilities themselves
            z = log_z.exp()
            mass, sums = mass + z.sum(dim=0), sums + z.T @ log_z
        for index, layer in enumerate(layers):
            alpha = self._maximise(alpha, mass, sums)
            v = torch.log(mass / self.images + EPS) + 1
            if index < len(layers) - 1:
                mass, sums = self._sums(alpha, v, layer)
        return self._finish(alpha, v, layers[-1])

    def _maximise(self, alpha: Tensor, mass: Tensor, sums: Tensor) -> Tensor:
        """Classes of no mass keep their old concentrations."""
        mass, sums = mass + self._support_mass, sums + self._support_sums
        alive = mass > EPS
        if not bool(alive.any()):
            return alpha
        y = sums[alive] / mass[alive, None]
        return alpha.index_copy(0, alive.nonzero()[:, 0], solve(alpha[alive], y, self._solver))

    def _log_u(self, alpha: Tensor, v: Tensor, layer: Layer, log_z: Tensor) -> Tensor:
        logits = (log_likelihood(alpha, log_z) + layer.balance * v) / layer.temperature
        return torch.log_softmax(logits, dim=-1)

    def _sums(self, alpha: Tensor, v: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        """Mass [classes] and summed log-probabilities [classes, classes] under the next assignments."""
        mass, sums = torch.zeros_like(v), torch.zeros_like(alpha)
        for log_z in self._log_z():
            log_u = self._log_u(alpha, v, layer, log_z)
            u = one_hot_of(log_u) if self._hard else log_u.exp()
            mass, sums = mass + u.sum(dim=0), sums + u.T @ log_z
        return mass, sums

    def _finish(self, alpha: Tensor, v: Tensor, layer: Layer) -> Fitted:
        rows, members, totals = [], torch.zeros_like(v), torch.zeros_like(alpha)
        for log_z in self._log_z():
            log_u = self._log_u(alpha, v, layer, log_z).float()
            chosen = one_hot_of(log_u).double()  # of what is returned, so that both agree
            members, totals = members + chosen.sum(dim=0), totals + chosen.T @ log_z.exp()
            rows.append(log_u)
        prototypes = totals / members.clamp_min(1)[:, None]
        return Fitted(torch.cat(rows), prototypes, members.long(), alpha, v)


def one_hot_of(scores: Tensor) -> Tensor:
    """One-hot rows of the first largest score."""
    return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1)


def match_clusters(fitted: Fitted, matching: str) -> Tensor:
    """Log-assignments to classes [images, classes], from those to anonymous clusters.

    "hungarian" gives each non-empty cluster a class of its own, maximising the prototypes' probabilities; empty
    clusters take the classes left over. "basic" gives each cluster its prototype's best class, so that several may
    share one. "none" keeps the clusters' numbers.
    """
    if matching == "none":
        return fitted.log_u
    full = fitted.members > 0
    if matching == "hungarian":
        return _hungarian(fitted, full)
    classes = fitted.prototypes.argmax(dim=1)
    scores = torch.full_like(fitted.log_u, float(fitted.log_u.min()) - 1)
    for cluster in full.nonzero()[:, 0].tolist():
        column = int(classes[cluster])
        scores[:, column] = torch.maximum(scores[:, column], fitted.log_u[:, cluster])
    return scores


def _hungarian(fitted: Fitted, full: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    clusters = full.nonzero()[:, 0]
    _, chosen = linear_sum_assignment(-fitted.prototypes[clusters].cpu().numpy())
    taken = torch.as_tensor(chosen, device=full.device)
    cluster_of = torch.full_like(fitted.members, -1)
    cluster_of[taken] = clusters
    cluster_of[cluster_of < 0] = (~full).nonzero()[:, 0]
    return fitted.log_u[:, cluster_of]

"""Muon: momentum, orthogonalised, for the matrices and convolutions of a network, and AdamW for all else."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic whose repetition brings singular values from (0, 1] near to 1 (Jordan et al. 2024)."""


class Muon(torch.optim.AdamW):
    """AdamW, but for parameter groups with `muon=True`, whose momentum is orthogonalised (Jordan et al. 2024).

    A convolution counts as the matrix (output channels, all else). An update has the size of AdamW's, a root mean
    square of 0.2 (Liu et al. 2025, "Muon is scalable", eq. 4), so both kinds of groups share a learning rate.
    Like torch's fused optimizers, it leaves a step out where `found_inf` is 1.

    Args:
        params, options: as AdamW's. Groups with `muon=True` hold parameters of two or more dimensions.
        momentum: of the groups with `muon=True`.
    """

    whole_matrices = True
    """An update needs whole matrices: not for FSDP."""

    def __init__(self, params: Iterable[dict[str, Any]], momentum: float = 0.95, **options: Any):
        super().__init__(params, **options)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step with all gradients."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                self._update(group)
        self.param_groups = [group for group in groups if not group.get("muon")]
        result = super().step(closure)
        self.param_groups = groups
        return result

    def _update(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        taken, gradients = 1.0, [p.grad for p in parameters]
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            taken, gradients = 1 - found_inf, [gradient.nan_to_num(0, 0, 0) for gradient in gradients]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)  # AdamW looks for it when a state is loaded
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            self.state[p]["step"] += taken
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        change = torch._foreach_sub(gradients, momenta)
        torch._foreach_mul_(change, (1 - self.momentum) * taken)
        torch._foreach_add_(momenta, change)
        directions = torch._foreach_lerp(gradients, momenta, self.momentum)  # Nesterov's
        for p, update in zip(parameters, orthogonalise([each.flatten(1) for each in directions]), strict=True):
            scaled = update.view_as(p) * (0.2 * math.sqrt(max(update.shape))) + group["weight_decay"] * p
            p.sub_(scaled * (group["lr"] * taken))


def orthogonalise(matrices: Sequence[Tensor], steps: int = 5) -> list[Tensor]:
    """The matrices with the same singular vectors, and singular values of about 1.

    The quintic's repetitions are multiplied up as polynomials of the smaller Gram matrix, which is a third of the work,
    for all matrices of one size at once.
    """
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    # By rows, so that the order of the sum does not depend on the number of threads.
    wide = [matrix / (matrix.norm(dim=1).norm() + 1e-7) for matrix in wide]
    a, b, c = COEFFICIENTS
    for size in {len(matrix) for matrix in wide}:
        numbers = [i for i, matrix in enumerate(wide) if len(matrix) == size]
        gram = torch.stack([wide[i] @ wide[i].mT for i in numbers])
        total = identity = torch.eye(size, device=gram.device, dtype=gram.dtype)
        for step in range(steps):
            polynomial = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
            total = polynomial @ total
            if step < steps - 1:
                gram = polynomial @ gram @ polynomial
        for i, product in zip(numbers, total, strict=True):
            wide[i] = product @ wide[i]
    pairs = zip(wide, matrices, strict=True)
    return [result if matrix.shape[0] <= matrix.shape[1] else result.mT for result, matrix in pairs]

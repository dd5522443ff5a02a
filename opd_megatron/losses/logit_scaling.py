"""From an LM head's product to the logits that a softmax takes: soft-capping, for models that have it (Gemma 2, arXiv 2408.00118), then the temperature.

Shapes: N tokens of one chunk, W = this rank's slice of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from opd_megatron.losses import triton_divergence


@dataclass(frozen=True, kw_only=True)
class LogitScaling:
    """z = softcap tanh(product / softcap) / temperature; without a softcap, z = product / temperature. Entry by entry, so that nothing is sent."""

    temperature: float = 1.0
    softcap: float | None = None

    def apply_(self, product_NW: torch.Tensor, damping_NW: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits in the product's memory. `damping_NW`, where given, becomes what the cap multiplies a gradient with: 1 - (capped / softcap)^2.

        It is made here because losses and their gradients overwrite the logits.
        """
        if self.softcap is None:
            return product_NW if self.temperature == 1 else product_NW.div_(self.temperature)
        if triton_divergence.usable_for(product_NW):
            return triton_divergence.soft_cap_(product_NW, damping_NW, self.softcap, self.temperature)
        product_NW.div_(self.softcap)
        if damping_NW is not None:
            # 1 - tanh^2 as 1 / cosh^2, which keeps its precision near the cap; where cosh overflows, this is 0.
            torch.cosh(product_NW, out=damping_NW).square_().reciprocal_()
        return product_NW.tanh_().mul_(self.softcap / self.temperature)


def logit_scalings(temperature: float, student_softcap: float | None, teacher_softcap: float | None) -> tuple[LogitScaling, LogitScaling]:
    """Return the student's and the teacher's; ValueError unless the temperature and each cap that is there are positive and finite."""
    require_temperature(temperature)
    for name, softcap in (("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)):
        if softcap is not None and not 0 < softcap < math.inf:
            raise ValueError(f"{name}={softcap} must be positive and finite, or None for logits that are not capped")
    return LogitScaling(temperature=temperature, softcap=student_softcap), LogitScaling(temperature=temperature, softcap=teacher_softcap)


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")

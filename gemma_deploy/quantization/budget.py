"""How many inputs of linears may stay unrounded where w8a8 rounds the others: what that costs differs by back end."""

from __future__ import annotations

from dataclasses import dataclass, replace

# What these read is heavy-tailed, and noise averaged over tokens does not say so. Real 270M, 4 windows of WikiText-2,
# 41 linears kept by their noise alone, 11 of 17 down_proj among them: all tokens but one lost KL 0.004, and one became
# another one (KL 6, a lead of 2.05 logits overturned; its massive activations arise in layers 0 and 1). With the 17 and
# nothing else the mean is 0.0026 and the largest 0.3.
HEAVY_TAILED = "mlp.down_proj"
# Square of what rounding adds to a linear's output over the square of that. Below it a linear is not worth keeping: the
# real 270M loses KL 0.0073 with 4 inputs of down_proj kept, 0.0054 with 8, whose noise begins at 3e-4.
LEAST_NOISE = 3e-4


@dataclass(frozen=True)
class Budget:
    """How many linears may read their inputs unrounded, and which come first.

    Args:
        share: of the multiplications in linears that those have at most. Linears that read one input go together, since
            one rounding serves them all.
        least_noise: below it none is left unrounded.
        first: linears of this name within a layer come before all others, by their noise.
    """

    share: float
    least_noise: float = LEAST_NOISE
    first: str | None = None

    def with_share(self, share: float | None) -> Budget:
        """The same with another share; with its own where that is None."""
        return self if share is None else replace(self, share=share)


FLOAT_PRODUCTS = Budget(0.1)  # an unrounded input costs a float product in the place of an integer one
# Where it costs a second integer product and no float one: room for every down_proj, a third of the linears at most,
# and the noisiest others.
INTEGER_PRODUCTS = Budget(0.34, 0.0, HEAVY_TAILED)

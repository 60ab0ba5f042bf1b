"""Every family of pipelines: what requests get at once is what each gets alone.

In float64 results are equal to rounding, which proves the mathematics; in float32 they are within a
stated bound, together and staggered. Families that should share forwards fail here if they do not.
"""

from __future__ import annotations

import torch

STAGGERED = (0, 1, 3, 6)
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}

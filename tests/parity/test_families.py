"""Every family of pipelines: what requests get at once is what each gets alone.

In float64 results are equal to rounding, which proves the mathematics; in float32 they are within a
stated bound, together and staggered. Families that should share forwards fail here if they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families.catalogue import FAMILIES
from families.family import Family, Variation
from torch import Tensor

from service.pipelines.lending import borrow
from service.pipelines.self_check import SharingReport, Trial, check_sharing

STAGGERED = (0, 1, 3, 6)
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}

"""What every method of compression returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bigtfm.config.sections import ModelSection
from bigtfm.model.quantized import Quantized


@dataclass(frozen=True)
class Compressed:
    """A model in fewer bits, with more zeros, or with fewer heads."""

    section: ModelSection
    parameters: Mapping[str, Tensor | Quantized]  # by the names of a model of that section
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the report and the run directory keep

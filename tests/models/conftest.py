"""The embedded model as plain modules in float32, as the oracle computes it."""

import pytest
import torch

from models.catalog import Weights
from models.device import Device, Tier
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import WeightStore
from tests.models import oracle


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Its text encoders and decoder."""
    return Pipeline(WeightStore(oracle.FAMILY), Device(), torch.float32)


@pytest.fixture(scope="module")
def registry() -> Registry:
    """All its variants, resident."""
    registry = Registry(WeightStore(oracle.FAMILY), Device(), torch.float32, [Tier("cpu", 1 << 40)])
    for name in oracle.FAMILY.variants:
        registry.load(Weights(name))
    return registry

"""The trace finds residual blocks and norms, or says that it can't."""

import pytest
import torch

from converter.flow import trace
from converter.layers import find_layers
from converter.zoo import ZOO
from tests.converter.calibrated import NETS


def test_the_trace_finds_every_block_of_a_resnet(images):
    net = ZOO["resnet20"]().eval()
    names = [layer.name for layer in find_layers(net)]
    flow = trace(net, names, torch.randn(2, 3, 32, 32))
    blocks = [name for name in names if name.endswith("conv2")]
    assert list(flow.residuals) == blocks
    assert all(flow.residuals[n].norm == n.replace("conv2", "bn2") for n in blocks)
    assert flow.normed == {n for n in names if "conv" in n}


@pytest.mark.parametrize("name", ["untraceable", "constant"])
def test_what_cannot_be_traced_for_a_copy_too_has_no_flow(name, images):
    assert trace(NETS[name]().eval(), ["1.a"], images).graph is None

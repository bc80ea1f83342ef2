"""Convolutions of an exported program come back as modules at their old paths."""

import pytest
import torch
from torch import nn

from bitnet_export.load import load, save

# name -> (convolution, an input's shape)
CONVOLUTIONS = {
    "padded": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 9)),
    "no bias": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (3, 2), padding="same"), (2, 4, 7, 9)),
    "valid": (nn.Conv2d(4, 6, 2, 2, padding="valid"), (2, 4, 8, 8)),
    "uneven": (nn.Conv2d(4, 6, (1, 3), (2, 1), (0, 2), (1, 2)), (2, 4, 7, 9)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 7, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 7, 9)),
    "1-D": (nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 9)),
    "1-D same": (nn.Conv1d(4, 6, 5, padding="same", dilation=2), (2, 4, 19)),
}
GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_module_path_geometry_and_answer(name, tmp_path):
    conv, shape = CONVOLUTIONS[name]
    model = nn.Sequential(nn.Tanh(), conv).eval()
    x = torch.randn(shape)
    loaded = load(save(model, tmp_path / "m.pt", x, None))
    back = loaded.module.get_submodule("1")
    assert type(back) is type(conv)
    assert list(loaded.module.state_dict()) == list(model.state_dict())
    for attribute in GEOMETRY:
        assert getattr(back, attribute) == getattr(conv, attribute), attribute
    assert torch.equal(loaded.module(x), model(x))


def test_one_weight_used_with_two_strides_is_two_modules_and_one_parameter(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            wide = nn.functional.conv2d(x, self.conv.weight, self.conv.bias, stride=2)
            return self.conv(x).mean((2, 3)) + wide.mean((2, 3)) + self.conv(x + 1).mean((2, 3))

    model, x = Twice().eval(), torch.randn(2, 4, 6, 6)
    module = load(save(model, tmp_path / "m.pt", x, None)).module
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(c.stride for c in convs) == [(1, 1), (2, 2)]
    assert convs[0].weight is convs[1].weight
    torch.testing.assert_close(module(x), model(x))


def test_a_computed_weight_is_no_module(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight * 2)

    model, x = Scaled().eval(), torch.randn(2, 4, 6, 6)
    module = load(save(model, tmp_path / "m.pt", x, None)).module
    assert not [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert torch.equal(module(x), model(x))

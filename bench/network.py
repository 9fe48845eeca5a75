"""A small detector to time criteria in, where no other project's is installed: plain convolutions, and a head a level."""

from torch import Tensor, cat, nn

_WIDTHS = (16, 32, 48, 64, 96)  # of strides 2, 4, 8, 16, 32
_NUM_LEVELS = 3


class Network(nn.Module):
    """Images (B, 3, H, W), sides divisible by 32 -> for every number of ``channels`` a tensor (B, channels, A)."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_stage(*pair) for pair in zip((3, *_WIDTHS), _WIDTHS, strict=False))
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Sequential(_conv(width, width), nn.Conv2d(width, outputs, 1)) for width in _WIDTHS[-_NUM_LEVELS:])
            for outputs in channels
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        levels = features[-_NUM_LEVELS:]
        return tuple(cat([head(x).flatten(2) for head, x in zip(heads, levels, strict=True)], 2) for heads in self.heads)


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, stride=2), _conv(outputs, outputs))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU(inplace=True))

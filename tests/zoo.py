"""Small models of every kind the engine must cut right, with their levels and example inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rlhf_ray.tasks import Inputs, Loss


@dataclass(frozen=True)
class Case:
    """A model, its levels, and inputs and targets of n examples."""

    model: Callable[[], nn.Module]
    levels: dict[str, list[str]]
    inputs: Callable[[int], Inputs]
    targets: Callable[[int], Tensor]
    mechanism: str
    loss: Loss = F.cross_entropy


def classes(n: int) -> Tensor:
    return torch.randint(0, 10, (n,))


def images(channels: int = 1, size: int = 16) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, channels, size, size)


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def norm_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(200, 10),
    )  # fmt: skip


class Net(nn.Module):
    """PyTorch's MNIST example: everything between the layers is functional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(16 * 36, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(x.view(batch, -1)))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class Lstm(nn.Module):
    """The second LSTM starts from the first one's state, whose batch dimension is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.first = nn.LSTM(8, 12, batch_first=True)
        self.second = nn.LSTM(12, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.first(self.embedding(x))
        _, (h, _) = self.second(out, state)
        return self.head(h[-1])


class TorchTransformer(nn.Module):
    """Built on nn.TransformerEncoder, whose control flow torch.fx cannot trace."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.position = nn.Parameter(torch.randn(1, 7, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = self.encoder(x, src_key_padding_mask=padding)
        keep = torch.ones_like(tokens) if padding is None else (~padding).long()
        return self.head((x * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(8)
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A traceable one; the padding mask flows around all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.register_buffer("position", torch.randn(7, 16))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, padding)
        keep = (~padding).unsqueeze(-1).to(x.dtype)
        return self.head((x * keep).sum(1) / keep.sum(1))


class UNet(nn.Module):
    """Fully convolutional segmentation; a skip connection flows around the middle level."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.up(self.middle(F.max_pool2d(skip, 1)))
        return self.head(torch.cat([skip, y], 1))


class Centred(nn.Linear):
    """Centres its features over the batch, in eval mode too."""

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        return x - x.mean(0)


class Mixing(nn.Module):
    """The prefix mixes the examples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Centred(6, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Looping(nn.Module):
    """Control flow that depends on the data, and a level that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.isfinite().all():
            x = self.a(x)
        return self.b(x)


class PreActivation(nn.Module):
    """Writes in place into what crosses the boundary, twice not the same as once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x.clone())
        x += y
        return self.c(x)


class Normed(nn.Module):
    """Weights made from others at each call, and normalisation of every other kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv2d(1, 8, 3))
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.b = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))  # power iteration in train mode
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.instance(self.group(self.a(x))))
        return self.head(F.relu(self.b(x)).mean((2, 3)))


class Packed(nn.Module):
    """Sequences of different lengths go through a recurrent layer packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.recurrent = nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        lengths = (~padding).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        _, hidden = self.recurrent(packed)
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1))


def convnext() -> nn.Module:
    config = torchvision.models.convnext.CNBlockConfig
    blocks = [config(16, 32, 2), config(32, None, 1)]
    return torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=10)


def tokens(n: int) -> dict[str, Tensor]:
    lengths = torch.randint(3, 8, (n, 1))
    lengths[0] = 7
    return {"tokens": torch.randint(0, 20, (n, 7)), "padding": torch.arange(7) >= lengths}


FOUR = {"conv1": ["0"], "conv2": ["3"], "dense": ["7"], "head": ["9"]}
RESNET = {"stem": ["conv1", "bn1"], **{f"layer{i}": [f"layer{i}"] for i in range(1, 5)},
          "fc": ["fc"]}  # fmt: skip

CASES = {
    "cnn2": Case(cnn, {"conv": ["0", "3"], "dense": ["7", "9"]}, images(), classes, "fx"),
    "cnn4": Case(cnn, FOUR, images(), classes, "fx"),
    "norm_cnn": Case(norm_cnn, {"a": ["0", "1", "3"], "b": ["5", "6"], "head": ["9", "10"]},
                     images(), classes, "fx"),
    "net": Case(Net, {"conv": ["conv1", "conv2"], "dense": ["dropout1", "fc1"], "head": ["fc2"]},
                images(1, 16), classes, "fx", F.nll_loss),
    "lstm": Case(Lstm, {n: [n] for n in ("embedding", "first", "second", "head")},
                 lambda n: torch.randint(0, 20, (n, 5)), classes, "fx"),
    "torch_transformer": Case(
        TorchTransformer,
        {"embedding": ["embedding"], **{f"block{i}": [f"encoder.layers.{i}"] for i in range(3)},
         "head": ["head"]}, tokens, classes, "replay"),
    "transformer": Case(
        Transformer, {"embedding": ["embedding"], "block0": ["blocks.0"], "block1": ["blocks.1"],
                      "head": ["head"]}, tokens, classes, "fx"),
    "unet": Case(UNet, {n: [n] for n in ("down", "middle", "up", "head")}, images(3, 8),
                 lambda n: torch.randint(0, 4, (n, 8, 8)), "fx"),
    "pre_activation": Case(PreActivation, {"a": ["a"], "b": ["b"], "c": ["c"]},
                           lambda n: (torch.randn(n, 6),), classes, "fx"),
    "resnet18": Case(lambda: torchvision.models.resnet18(weights=None), RESNET, images(3, 64),
                     classes, "fx"),
    "normed": Case(Normed, {"a": ["a", "group"], "b": ["instance", "b"], "head": ["head"]},
                   images(1, 10), classes, "fx"),
    "convnext": Case(convnext, {"stem": ["features.0"], "stage": ["features.1"],
                                "down": ["features.2"], "top": ["features.3", "classifier"]},
                     images(3, 16), classes, "fx"),
}  # fmt: skip

PACKED = Case(
    Packed, {n: [n] for n in ("embedding", "recurrent", "head")}, tokens, classes, "replay"
)
"""What its recurrent layer puts out has no batch dimension: below the head nothing is cached."""

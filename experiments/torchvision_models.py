"""Models of torchvision through the stage engine: is it exact, what is cached, what is won.

    python experiments/torchvision_models.py [MODEL ...]

Each model (small where its size can be chosen, its weights random, seed 0) is cut into levels and
fine-tuned along three paths: the last level, then the first; the middle one, then the last; all at
once; each stage 5 steps of SGD with batch 16. The same in plain torch. Shown are the boundaries
between levels that can be cached, the largest difference of a loss and of the weights (in float32;
relative to the loss, and to how far the weights moved), and FLOPs charged over those that torch's
own counter finds. Then how much faster than the plain loop a later stage is, as in stage_speed.py:
20 steps of Adam with batch 64, then 256 images of val; one thread, processor seconds, medians of
three. Writes torchvision_models.md; of the MODELs named, if any are, only prints.
"""

import copy
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from stage_speed import Case, measured
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig

import rlhf_ray as rr
from rlhf_ray.digests import derive_seed
from rlhf_ray.engine.batches import batch_order
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import StagePath, StageRequest, StageStep
from rlhf_ray.tree.stage_tree import LocalStages

tv = torchvision.models
STEPS, BATCH = 5, 16
HEADER = """\
| model | pixels | cached boundaries | loss differs by | weights by | FLOPs over torch's | \
plain / later: first level | middle | last |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def image_model(
    model: Callable[[], nn.Module], levels: str, pixels: int = 32
) -> tuple[Callable[[], nn.Module], dict[str, list[str]], int]:
    """A model, its levels by the names of their modules, and the width of its images."""
    return model, {name.replace(".", "_"): [name] for name in levels.split()}, pixels


def vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, 4, 4, 64, 128, num_classes=10, dropout=0.1)


def swin() -> nn.Module:
    return tv.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10)


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)]
    return tv.ConvNeXt(blocks, num_classes=10, stochastic_depth_prob=0.1)


def googlenet() -> nn.Module:
    return tv.googlenet(num_classes=10, aux_logits=False, init_weights=False)


def named(name: str) -> Callable[[], nn.Module]:
    """Of torchvision, for 10 classes."""
    return lambda: tv.get_model(name, num_classes=10)


VIT_LAYERS = " ".join(f"encoder.layers.encoder_layer_{i}" for i in range(4))
MODELS = {
    "resnet18": image_model(named("resnet18"), "layer1 layer2 layer3 layer4 fc"),
    "resnext50_32x4d": image_model(named("resnext50_32x4d"), "layer1 layer2 layer3 layer4 fc"),
    "densenet121": image_model(
        named("densenet121"),
        "features.conv0 features.denseblock1 features.denseblock2 features.denseblock4 classifier",
    ),
    "googlenet": image_model(googlenet, "conv1 inception3a inception4a inception5b fc", 64),
    "squeezenet1_1": image_model(
        named("squeezenet1_1"), "features.0 features.3 features.6 features.12 classifier", 64
    ),
    "shufflenet_v2_x0_5": image_model(
        named("shufflenet_v2_x0_5"), "conv1 stage2 stage3 stage4 conv5 fc"
    ),
    "mobilenet_v2": image_model(
        named("mobilenet_v2"), "features.0 features.5 features.12 features.18 classifier"
    ),
    "mobilenet_v3_small": image_model(
        named("mobilenet_v3_small"), "features.0 features.4 features.8 features.12 classifier"
    ),
    "efficientnet_b0": image_model(
        named("efficientnet_b0"), "features.0 features.3 features.5 features.8 classifier"
    ),
    "regnet_y_400mf": image_model(
        named("regnet_y_400mf"),
        "stem trunk_output.block1 trunk_output.block2 trunk_output.block4 fc",
    ),
    "VisionTransformer": image_model(vit, f"conv_proj {VIT_LAYERS} heads"),
    "SwinTransformer": image_model(swin, "features.0 features.1 features.3 head"),
    "ConvNeXt": image_model(convnext, "features.0 features.1 features.3 classifier"),
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """How far the engine's stages are from a plain loop's, and what they are charged."""

    cached: str
    loss: float
    weights: float
    flops: float


def checked(model: nn.Module, levels: dict[str, list[str]], pixels: int) -> Checked:
    torch.manual_seed(0)
    sizes = {"train": 64, "val": 32, "test": 1}
    splits = [{name: (torch.randn(n, 3, pixels, pixels), torch.arange(n) % 10)
               for name, n in sizes.items()} for _ in range(2)]  # fmt: skip
    tasks = [rr.Task(name=str(i), **split) for i, split in enumerate(splits)]
    suite = rr.Suite(name="models", model=model, levels=levels, train_tasks=tasks, val_tasks=[],
                     test_tasks=[])  # fmt: skip
    # dropout draws its masks in memory order: here in plain torch's
    engine = Engine(suite, EngineSettings(device="cpu", val_size=32, channels_last=False))
    stages = LocalStages(engine)
    losses, weights = [], []
    for path in paths(len(levels)):
        request = StageRequest(task="0", path=path)
        loss, state = plain_loop(suite, engine, path)
        losses.append(abs(stages.outcome(request).outcome.loss / loss - 1))
        weights.append(distance(stages.state_dict(request), state, model.state_dict()))
    path = paths(len(levels))[0]
    paid = [sum(stages.outcome(StageRequest(task="0", path=path[:n])).outcome.flops.values())
            for n in range(len(path) + 1)]  # fmt: skip
    # the other task: nothing of it is cached, and what FLOPs are by shape is known
    with FlopCounterMode(display=False) as counter:
        stages.outcome(StageRequest(task="1", path=path))
    usable = engine.plan.usable[1:]
    return Checked(f"{sum(usable)} of {len(usable)}", max(losses), max(weights),
                   sum(paid) / counter.get_total_flops())  # fmt: skip


def paths(n_levels: int) -> list[StagePath]:
    train = Train(name="train", learning_rate=1e-3, optimizer="sgd", steps=STEPS, batch_size=BATCH)
    last, middle, every = (n_levels - 1,), (n_levels // 2,), tuple(range(n_levels))
    return [tuple(StageStep(operation=train, levels=levels) for levels in path)
            for path in ((last, (0,)), (middle, last), (every,))]  # fmt: skip


def plain_loop(suite: rr.Suite, engine: Engine, path: StagePath) -> tuple[float, dict[str, Tensor]]:
    """Loss on val and weights after the stages of a path, each of other levels, in plain torch."""
    model, task = copy.deepcopy(suite.model), suite.task("0")
    (x, y), (x_val, y_val) = task.train, task.val
    for n, step in enumerate(path, start=1):
        seed = derive_seed("stage", engine.identity.key(StageRequest(task="0", path=path[:n])))
        model.eval().requires_grad_(False)
        for level in step.levels:
            for name in list(suite.levels.values())[level]:
                model.get_submodule(name).train().requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
        torch.manual_seed(seed)
        order = batch_order(len(y), STEPS, BATCH, torch.Generator().manual_seed(seed))
        for index in order:
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x_val), y_val)), model.state_dict()


def distance(a: dict[str, Tensor], b: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """Norm of a - b over that of b - before, of floating-point tensors together."""
    keys = [key for key, value in b.items() if value.is_floating_point()]
    apart, moved = (sum(float((u[k].double() - v[k].double()).square().sum()) for k in keys)
                    for u, v in ((a, b), (b, before)))  # fmt: skip
    return (apart / moved) ** 0.5


def rows(names: list[str]) -> Iterator[str]:
    for name in names:
        model, levels, pixels = MODELS[name]
        torch.manual_seed(0)
        found = checked(model(), levels, pixels)
        shown = (0, len(levels) // 2, len(levels) - 1)
        case = Case(name=name, model=model, levels=levels, shown=shown,
                    inputs=lambda n, pixels=pixels: torch.randn(n, 3, pixels, pixels))  # fmt: skip
        ratios = [f"{plain / later:.1f}" for _, plain, _, later in measured(case, "cpu")]
        yield (f"| {name} | {pixels} | {found.cached} | {found.loss:.0e} | {found.weights:.0e} | "
               f"{found.flops:.3f} | {' | '.join(ratios)} |\n")  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    table = [HEADER]
    sys.stdout.write(HEADER)
    for row in rows(sys.argv[1:] or list(MODELS)):
        table.append(row)
        sys.stdout.write(row)
        sys.stdout.flush()
    if not sys.argv[1:]:
        made = (f"\nMade by torchvision_models.py (one thread of {platform.machine()}, Python "
                f"{platform.python_version()}, torch {torch.__version__}, torchvision "
                f"{torchvision.__version__}).\n")  # fmt: skip
        Path(__file__).with_suffix(".md").write_text("".join([*table, made]))


if __name__ == "__main__":
    main()

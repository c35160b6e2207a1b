"""The learner: gradient steps of the hand-over backup over all levels together."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from ray.rllib.core import ALL_MODULES
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from rlhf_ray.algorithms.handover import TdLoss, Transitions, td_loss
from rlhf_ray.algorithms.settings import AlgorithmSettings
from rlhf_ray.policies.networks import LevelQNetworks


class HandoverLearner(TorchLearner):
    """Holds the networks, their target copies and one optimizer over all levels."""

    config: Any  # a HandoverDQNConfig; RLlib declares its general class
    module: Any  # a LevelsModule

    def build(self) -> None:
        """Builds modules and optimizer, and copies the networks."""
        torch.set_num_threads(1)
        super().build()
        self.target = copy.deepcopy(self.networks).requires_grad_(False)

    def start_over(self) -> None:
        """Takes back the initial weights, and forgets the optimizer's state."""
        initial = LevelQNetworks(self.networks.settings, seed=self.module.network_seed)
        for networks in (self.networks, self.target):
            networks.load_state_dict(initial.state_dict())
        (optimizer,) = self._named_optimizers.values()
        optimizer.state.clear()

    @property
    def networks(self) -> LevelQNetworks:
        """The networks that learn."""
        return self.module.networks

    def configure_optimizers(self) -> None:
        """One AdamW: a shared encoder must not be stepped once per level."""
        parameters = list(self.networks.parameters())
        settings: AlgorithmSettings = self.config.settings
        assert settings.learning_rate is not None  # build_algorithm completed them
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.register_optimizer(
            module_id=ALL_MODULES, optimizer=optimizer, params=parameters, lr_or_lr_schedule=None
        )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: Any, fwd_out: dict[str, Any]
    ) -> TdLoss:  # pyright: ignore[reportIncompatibleMethodOverride] more than the bare loss
        """The loss over all levels' transitions at once (`module_id` is ALL_MODULES)."""
        return td_loss(
            batch,
            self.networks,
            self.target,
            gamma=config.settings.gamma,
            double_q=config.settings.double_q,
            huber=config.td_error_loss_fn == "huber",
        )

    def update_on(
        self, batches: Iterable[Transitions], *, learning_rates: Sequence[float]
    ) -> dict[str, float]:
        """One gradient step and one step of the target networks per batch.

        RLlib's `update` takes 10 to 25 ms per batch here, nearly all of it conversion and metrics.

        Args:
            batches: the batches, in order.
            learning_rates: Adam's, one per batch.

        Returns:
            Means over the batches: `loss`, `td_error`, `q_value`.
        """
        settings: AlgorithmSettings = self.config.settings
        (optimizer,) = self._named_optimizers.values()
        online, target = list(self.networks.parameters()), list(self.target.parameters())
        logged: list[torch.Tensor] = []
        for batch, learning_rate in zip(batches, learning_rates, strict=True):
            optimizer.param_groups[0]["lr"] = learning_rate
            result = self.compute_loss_for_module(
                module_id=ALL_MODULES, config=self.config, batch=batch, fwd_out={}
            )
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            if self.config.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(online, self.config.grad_clip)
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target, online, strict=True):
                    slow.lerp_(fast, settings.tau)
            logged.append(torch.stack((result.loss.detach(), result.td_error, result.q_value)))
        self._weights_seq_no += 1
        means = torch.stack(logged).mean(dim=0).tolist()
        return dict(zip(("loss", "td_error", "q_value"), means, strict=True))

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes a state; the target networks, which are not in it, start from the weights."""
        super().set_state(state)
        self.target.load_state_dict(self.networks.state_dict())

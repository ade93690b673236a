"""From released gradients to weights: optimizers, learning rate, and free post-processing (SPECIFICATION.md 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dptune.config.schema import EnvironmentConfig, HyperparameterConfig
from dptune.privacy.subspace import adam_bc, ema, james_stein, shrink_singular_values

BETAS, EPSILON, MOMENTUM = (0.9, 0.999), 1e-8, 0.9

Parameters = Mapping[str, torch.nn.Parameter]


class DPAdamBC(torch.optim.Optimizer):
    """Adam without the bias that the noise puts on the second moment (arXiv:2312.14334; SPECIFICATION.md 6).

    `set_noise` must be called before each step with the standard deviation of the noise in each gradient.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, floor: float, weight_decay: float) -> None:
        """Floor: smallest debiased second moment, in units of the noise variance."""
        super().__init__(list(parameters), {"lr": lr, "floor": floor, "weight_decay": weight_decay})
        self._noise: dict[torch.nn.Parameter, float] = {}

    def set_noise(self, std: Mapping[torch.nn.Parameter, float]) -> None:
        """Noise of the gradients of the next step; zero without privacy."""
        self._noise = dict(std)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on all parameters that have a gradient; weight decay is decoupled."""
        first, second = BETAS
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
                    state["phi"] = torch.zeros(())
                state["step"] += 1
                state["m"] = ema(state["m"], parameter.grad, first)
                state["v"] = ema(state["v"], parameter.grad.square(), second)
                state["phi"] = ema(state["phi"], torch.tensor(self._noise[parameter] ** 2), second)
                unbias, phi = 1 - second ** state["step"], float(state["phi"]) / (1 - second ** state["step"])
                moment = state["m"] / (1 - first ** state["step"])
                direction = adam_bc(moment, state["v"] / unbias, phi, max(group["floor"] * phi, EPSILON**2))
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda values, floor, **settings: torch.optim.AdamW(values, betas=BETAS, eps=EPSILON, **settings),
    "adam": lambda values, floor, **settings: torch.optim.Adam(values, betas=BETAS, eps=EPSILON, **settings),
    "sgd": lambda values, floor, **settings: torch.optim.SGD(values, momentum=MOMENTUM, **settings),
    "dp_adam_bc": DPAdamBC,
}
"""What each choice of `environment.optimizer` makes of parameters, `floor`, `lr` and `weight_decay`."""


def make_optimizer(
    parameters: Parameters, hyperparameter: HyperparameterConfig, environment: EnvironmentConfig
) -> torch.optim.Optimizer:
    """The optimizer that the environment names."""
    return OPTIMIZERS[environment.optimizer](
        list(parameters.values()),
        floor=environment.adam_bc_floor,
        lr=hyperparameter.learning_rate,
        weight_decay=hyperparameter.weight_decay,
    )


def learning_rate_factor(hyperparameter: HyperparameterConfig) -> Callable[[int], float]:
    """Learning rate over its peak, by step from 0: linear warm-up, then linear decay to zero or constant."""
    warmup, steps = hyperparameter.warmup_steps, hyperparameter.steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 1.0 if hyperparameter.decay == "constant" else (steps - step) / (steps - warmup)

    return factor


def update(
    parameters: Parameters,
    gradients: Mapping[str, torch.Tensor],
    noise_std: Mapping[str, float],
    optimizer: torch.optim.Optimizer,
    shrinkage: str = "none",
) -> None:
    """One optimizer step on released gradients.

    Args:
        parameters: all trained parameters by name.
        gradients: what the mechanism let out, by name.
        noise_std: noise in each coordinate of each parameter's gradient, by name.
        optimizer: over `parameters`.
        shrinkage: what is done to a gradient first: `none`, `james_stein` or `singular_value`.

    Raises:
        ValueError: when a gradient is missing or too many.
    """
    if gradients.keys() != parameters.keys():
        differing = sorted(gradients.keys() ^ parameters.keys())
        raise ValueError(f"released gradients and trained parameters differ in {', '.join(differing)}")
    for name, parameter in parameters.items():
        gradient = SHRINKAGES[shrinkage](gradients[name], noise_std[name])
        parameter.grad = gradient.to(parameter.device, parameter.dtype)
    if isinstance(optimizer, DPAdamBC):
        optimizer.set_noise({parameter: noise_std[name] for name, parameter in parameters.items()})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _singular_value(gradient: torch.Tensor, std: float) -> torch.Tensor:
    return shrink_singular_values(gradient, std) if gradient.ndim == 2 and std > 0 else gradient


SHRINKAGES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "none": lambda gradient, std: gradient,
    "james_stein": james_stein,
    "singular_value": _singular_value,
}


class IterateAverage:
    """Exponential moving average of the weights, put in their place at the end (arXiv:2204.13650)."""

    def __init__(self, parameters: Parameters, decay: float) -> None:
        """Decay 0 keeps the last iterate."""
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.averages = {name: torch.zeros_like(value) for name, value in parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Take the current weights in."""
        self.steps += 1
        self.averages = {name: ema(self.averages[name], value, self.decay) for name, value in self.parameters.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the weights by their average, corrected for its start at zero."""
        for name, value in self.parameters.items():
            value.copy_(self.averages[name] / (1 - self.decay**self.steps))

    def state_dict(self) -> dict[str, Any]:
        """The averages, before the correction."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps = state["steps"]
        self.averages = {name: state["averages"][name].to(value.device) for name, value in self.parameters.items()}

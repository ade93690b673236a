"""What training changes in a model: all that a checkpoint must hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dptune.models.adapters import trainable_parameters
from dptune.models.quantization import QuantizedLayer


class AdapterState:
    """Trained parameters, the buffers beside them (the masks of PST), and what AdaLoRA remembers between steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, not copied, and plain values."""
        state: dict[str, Any] = {"tensors": self._tensors()}
        if (allocator := self._allocator()) is not None:
            state["ranks"] = {
                "pattern": self.model.peft_config["default"].rank_pattern,
                **{name: getattr(allocator, name) for name in IMPORTANCES},
            }
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the tensors back.

        Raises:
            ValueError: when names or shapes are those of another model.
        """
        own, stored = self._tensors(), state["tensors"]
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in stored.items()}:
            raise ValueError("the checkpoint holds other parameters than the model")
        for name, value in own.items():
            value.copy_(stored[name])
        if (allocator := self._allocator()) is not None:
            self.model.peft_config["default"].rank_pattern = state["ranks"]["pattern"]
            for name in IMPORTANCES:
                devices = {
                    key: self.model.get_parameter(f"base_model.model.{key}").device for key in state["ranks"][name]
                }
                setattr(allocator, name, {key: state["ranks"][name][key].to(devices[key]) for key in devices})

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = dict(trainable_parameters(self.model))
        for name, module in self.model.named_modules():
            # The codes of a rounded weight are no less frozen when the bias beside them is trained.
            own = [value for value in module.parameters(recurse=False) if value.requires_grad]
            if own and not isinstance(module, QuantizedLayer):
                tensors |= {f"{name}.{key}": value for key, value in module.named_buffers(recurse=False)}
        return tensors

    def _allocator(self) -> Any:
        return getattr(getattr(self.model, "base_model", None), "rankallocator", None)


IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Running means of PEFT's `RankAllocator`, by parameter; functions of released gradients."""

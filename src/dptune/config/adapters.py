"""The adapters: one literal dict of everything that is known of each before a backbone is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterKind:
    """One kind of adapter."""

    attach: str
    """Module of `dptune.models` and function that puts a fresh one on a backbone."""
    engine: str = "functional"
    """The fastest engine of per-example gradients that is right."""
    engine_on: Mapping[str, str] = field(default_factory=dict)
    """Where another engine is needed, by architecture."""
    impossible: Mapping[str, str] = field(default_factory=dict)
    """Why it cannot work, by architecture."""
    after_step: str | None = None
    """Module and function of what is done to it after each step of the optimizer."""
    unchanged: bool = True
    """Whether a fresh one leaves the backbone's outputs as they are."""
    placed: bool = True
    """Whether `target_modules` and `top_layers` say where it is."""
    top_only: bool = False
    """Whether only `top_layers` says where it is."""
    virtual: bool = False
    """Whether `virtual_tokens` positions before the text are its own."""
    own_weights: bool = False
    """Whether it trains the backbone's own parameters, which must be float32 then."""
    changes_matrices: bool = False
    """Whether it trains or prunes the matrices of linear layers, which must not be rounded then."""


LINEAR_ONLY = {"gpt2": "PEFT has it for linear layers only, and GPT-2's are Conv1D"}

ADAPTERS: Mapping[str, AdapterKind] = {
    "lora": AdapterKind("peft_adapters.lora", engine="hooks"),
    "ffa_lora": AdapterKind("peft_adapters.ffa_lora", engine="hooks"),
    "lora_xs": AdapterKind("peft_adapters.lora_xs", engine="hooks"),
    "dora": AdapterKind("peft_adapters.dora"),
    "adalora": AdapterKind("peft_adapters.adalora", after_step="peft_adapters.reallocate"),
    "vera": AdapterKind("peft_adapters.vera"),
    "ia3": AdapterKind("peft_adapters.ia3"),
    "loha": AdapterKind("peft_adapters.loha", impossible=LINEAR_ONLY),
    "lokr": AdapterKind("peft_adapters.lokr", impossible=LINEAR_ONLY),
    "oft": AdapterKind("peft_adapters.oft", impossible=LINEAR_ONLY),
    "boft": AdapterKind("peft_adapters.boft", impossible=LINEAR_ONLY),
    "fourierft": AdapterKind("peft_adapters.fourierft"),
    "prompt": AdapterKind("peft_adapters.prompt", unchanged=False, placed=False, virtual=True),
    "p_tuning": AdapterKind("peft_adapters.p_tuning", unchanged=False, placed=False, virtual=True),
    "prefix": AdapterKind("peft_adapters.prefix", unchanged=False, placed=False, virtual=True),
    "houlsby": AdapterKind("own_adapters.houlsby", engine="hooks", top_only=True),
    "pfeiffer": AdapterKind("own_adapters.pfeiffer", engine="hooks", top_only=True),
    "parallel": AdapterKind("own_adapters.parallel", engine="hooks", top_only=True),
    "bitfit": AdapterKind("own_adapters.bitfit", own_weights=True),
    "ln_tuning": AdapterKind("peft_adapters.ln_tuning", own_weights=True),
    "head": AdapterKind("own_adapters.head", engine="hooks", placed=False, own_weights=True),
    "full": AdapterKind(
        "own_adapters.full",
        engine_on={"encoder_decoder": "loop"},  # T5's relative_attention_bias is looked up once for a whole batch.
        top_only=True,
        own_weights=True,
        changes_matrices=True,
    ),
    "pst": AdapterKind("pst.pst", after_step="pst.prune", changes_matrices=True),
}
"""Every choice of `adapter.name`."""

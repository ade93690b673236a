"""Prompt tuning and p-tuning whose rows do not depend on each other, in PEFT's file format.

PEFT's own forward pass makes one prompt and repeats it for the batch, so that hooks see one row instead of one a record
(Opacus then clips and noises the wrong thing without a word), and drops position ids, so that a row's result depends
on how much padding its batch mates cause. Here the prompt is made once a row and positions count real tokens only.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model


class SoftPromptModel(PeftModel):
    """A backbone that reads trained embeddings before its input. `PeftModel.from_pretrained` opens what it saves."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Output of the backbone for the tokens alone: logits of the prompt are left out.

        Args:
            input_ids: tokens [b, t], padded on the right.
            attention_mask: 1 where there is a token [b, t]; None where no token sees those after it.
            position_ids: their positions [b, t], counted without the prompt; None where the backbone takes none.
            inputs: what else the backbone takes.
        """
        embeddings = self._prompted(input_ids)
        length = embeddings.shape[1] - input_ids.shape[1]
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(len(input_ids), length), attention_mask], dim=1)
        if position_ids is not None:
            # A row's first token has its smallest position, wherever padding stands.
            first = position_ids.amin(dim=1, keepdim=True)
            head = first + torch.arange(length, device=first.device)
            inputs["position_ids"] = torch.cat([head, position_ids + length], dim=1)
        output = self.get_base_model()(inputs_embeds=embeddings, attention_mask=attention_mask, **inputs)
        if "decoder_input_ids" not in inputs and output.logits.shape[1] == embeddings.shape[1]:
            output.logits = output.logits[:, length:]
        return output

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Tokens of input and output [b, t + n], as `generate` of the backbone gives them."""
        embeddings = self._prompted(input_ids)
        prompt = attention_mask.new_ones(len(input_ids), embeddings.shape[1] - input_ids.shape[1])
        mask = torch.cat([prompt, attention_mask], dim=1)
        model: Any = self.get_base_model()
        if not model.config.is_encoder_decoder:
            # Padding on the left goes before the prompt: it never stands between the prompt and the text.
            order = mask.argsort(dim=1, stable=True)
            embeddings = embeddings.gather(1, order.unsqueeze(2).expand_as(embeddings))
            mask = mask.gather(1, order)
        written = model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
        return written if model.config.is_encoder_decoder else torch.cat([input_ids, written], dim=1)

    def _prompted(self, input_ids: torch.Tensor) -> torch.Tensor:
        encoder: Any = self.prompt_encoder[self.active_adapter]
        config: Any = self.active_peft_config
        numbers = self.prompt_tokens[self.active_adapter][: config.num_virtual_tokens].to(input_ids.device)
        # PEFT stores what the network of p-tuning makes, and opens it without the network.
        make = encoder.embedding if config.inference_mode else encoder
        prompts = make(numbers.expand(len(input_ids), -1))
        backbone: Any = self.get_base_model()
        tokens = backbone.get_input_embeddings()(input_ids)
        return torch.cat([prompts.to(tokens.dtype), tokens], dim=1)


def attach_soft_prompt(model: torch.nn.Module, config: PeftConfig) -> PeftModel:
    """The frozen backbone with a fresh prompt of a PEFT config of prompt tuning, p-tuning or prefix tuning."""
    if config.peft_type == PeftType.PREFIX_TUNING:
        # A prefix is made once a row by PEFT itself, which also moves positions.
        return get_peft_model(model, config)
    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    return SoftPromptModel(model, config)

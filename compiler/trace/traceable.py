"""The torch modules as the exporter sees them: exactly the inputs and outputs of the interfaces, no options."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AttentionInterface, CLIPTextModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sdc.compiler.load import Checkpoint

CAUSAL_ATTENTION = "sdc_causal"
"""One `scaled_dot_product_attention` that is causal."""

DECOMPOSED_ATTENTION = "eager"
"""MatMul, a mask, Softmax and MatMul."""


class _TextEncoder(nn.Module):
    def __init__(self, network: CLIPTextModel, attention: str) -> None:
        super().__init__()
        # transformers builds an explicit mask while it is traced; a text encoder without padding mask is just causal.
        AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
        network.set_attn_implementation(attention)
        self.network = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(input_ids)
        return output.last_hidden_state, output.pooler_output


class _Unet(nn.Module):
    def __init__(self, network: UNet2DConditionModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.network(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return output


class _VaeDecoder(nn.Module):
    def __init__(self, network: AutoencoderKL) -> None:
        super().__init__()
        network.encoder, network.quant_conv = None, None
        self.network = network

    def forward(self, latent_sample: Tensor) -> Tensor:
        output: Tensor = self.network.decode(latent_sample, return_dict=False)[0]
        return output


class _VaeEncoder(nn.Module):
    def __init__(self, network: AutoencoderKL) -> None:
        super().__init__()
        network.decoder, network.post_quant_conv = None, None
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.network.encoder(sample)
        return moments if self.network.quant_conv is None else self.network.quant_conv(moments)


def traceable_module(checkpoint: Checkpoint, name: str, *, text_attention: str = CAUSAL_ATTENTION) -> nn.Module:
    """The component's network with exactly the inputs and outputs of its interface.

    Args:
        checkpoint: has the weights.
        name: of the component.
        text_attention: how the text encoder computes its attention, `CAUSAL_ATTENTION` or `DECOMPOSED_ATTENTION`.
    """
    if name == "text_encoder":
        return _TextEncoder(checkpoint.text_encoder(), text_attention).eval()
    if name == "unet":
        return _Unet(checkpoint.unet()).eval()
    return (_VaeDecoder if name == "vae_decoder" else _VaeEncoder)(checkpoint.vae()).eval()

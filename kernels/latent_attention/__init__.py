"""Attention of one token to latents whose number stands on the device."""

from .kernel import latent_attention
from .naive import naive_latent_attention

__all__ = ["latent_attention", "naive_latent_attention"]

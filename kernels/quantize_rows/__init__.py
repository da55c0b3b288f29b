"""Activations to int8 in blocks of 32."""

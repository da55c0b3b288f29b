"""Waiting on the device for what was under way when a step was planned."""

from .kernel import wait_landed
from .naive import naive_wait_landed

__all__ = ["naive_wait_landed", "wait_landed"]

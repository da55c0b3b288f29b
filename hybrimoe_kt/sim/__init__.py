"""Traces, replay on a virtual clock, and the reports made from them."""

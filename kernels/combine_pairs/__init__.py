"""Weighted sum of every token's answers."""

"""Argument parsing and rendering only."""

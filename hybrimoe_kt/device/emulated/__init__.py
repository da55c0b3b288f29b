"""Accelerators made of nothing but the CPU: at once, in the worst order, or in the time real hardware would take."""

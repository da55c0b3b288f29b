"""What any engine talks to: experts in, one call a layer, everything between host and accelerators behind it."""

"""What later layers will need: guesses of their routing, and which transfers are worth starting for them."""

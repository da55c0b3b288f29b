"""Steps of the model: of one conversation or several, eager, as graphs or by replay."""

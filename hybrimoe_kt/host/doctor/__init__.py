"""What this machine and a model file can do, and what would make it better."""

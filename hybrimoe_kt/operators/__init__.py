"""What a rule file names, and nothing else: a module in place of each kind of the model's own."""

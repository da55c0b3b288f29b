"""What a rule file names: thin modules that hand their work to the runtime."""

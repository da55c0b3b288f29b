"""What chooses which expert loses its slot."""

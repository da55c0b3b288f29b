"""What holds answers to a form: masks over the vocabulary, and grammars of each notation."""

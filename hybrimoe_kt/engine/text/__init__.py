"""Text as tokens, and back: tokenizers of files, and what tells where a token's text stands."""

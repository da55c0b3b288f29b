"""What tells where a token's text stands: bytes of tokens, detokenizing, where answers stop."""

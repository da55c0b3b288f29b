"""The CPU's share of a captured token: words in mapped memory, who serves them, and how a stream waits for them."""

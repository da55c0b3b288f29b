"""(token, expert) pairs grouped by expert, in blocks for a grouped matrix product."""

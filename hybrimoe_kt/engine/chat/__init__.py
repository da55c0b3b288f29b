"""How one model writes conversations: its template, thoughts, tool calls, and where turns begin."""

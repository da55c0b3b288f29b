"""What is kept of conversations: keys, values and states, copies of them, and files."""

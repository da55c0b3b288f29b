"""The server: OpenAI's, Anthropic's and Ollama's interfaces, statistics and a chat page over one loaded model.

`run` needs the `serve` extra; nothing here is imported by a chat in the terminal.
"""

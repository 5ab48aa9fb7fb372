"""Published task sets, asked through the HTTP API of any OpenAI-compatible server."""

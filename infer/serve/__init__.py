"""HTTP server with the interface of OpenAI's API."""

"""The doors: HTTP in the OpenAI protocol, and the chat page."""

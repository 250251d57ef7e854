"""The engine over HTTP, as clients of the OpenAI API expect it."""

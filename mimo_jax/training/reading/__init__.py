"""A tower that reads code: pictures of text drawn here, a tower that tells characters, and its joining to a model."""

"""Checkpoints: the published Hugging Face layouts and Orbax."""

"""Drafters, one file per kind; `mimo_jax.decode.drafter` is what the loop knows of them."""

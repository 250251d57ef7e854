"""MiMo UltraSpeed in JAX."""

"""From a machine and a checkpoint to a verdict on the claim of 1,000 tokens per second."""

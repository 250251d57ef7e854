"""What stands between the decoding loop and those who talk to it."""

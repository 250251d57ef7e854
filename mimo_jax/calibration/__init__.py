"""Rounding experts to MXFP4 by what they meet in a text, instead of each weight by itself."""

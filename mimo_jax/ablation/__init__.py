"""Ablations: a study is a file; its runs are resumed, compared with their control, and told with intervals."""

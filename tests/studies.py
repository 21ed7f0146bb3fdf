"""What study files of tests have in common: a network that trains in a moment."""

TINY_NET = """
[model]
features = [4, 4, 4, 4, 4, 4]
groups = 2
[preprocess]
size = [32, 32]
"""

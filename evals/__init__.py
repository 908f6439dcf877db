"""Evaluation: a backbone in, numbers and pictures out. One file a protocol, one line in the registry."""

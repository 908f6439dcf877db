"""Self-supervised training of a backbone: settings, the loop, and what a run says of itself."""

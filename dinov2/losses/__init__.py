"""The losses as pure functions: teacher targets, DINO, iBOT, KoLeo. Each changes nothing of its caller's."""

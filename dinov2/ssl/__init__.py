"""Student and teacher, and what the one learns from the other."""

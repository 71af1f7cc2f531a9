"""How judges are taught, and how far they can be trusted."""

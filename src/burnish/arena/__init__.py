"""Battles of pictures, votes on them, and ratings from votes."""

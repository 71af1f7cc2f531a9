"""The embedded world: small scenes with known truth (numpy and Pillow only).

A scene is a flat mapping of attributes. The renderer draws it, the grammar says it in words, an
edit changes some of its attributes, a flaw spoils it, and the oracle measures from pixels alone how
much of it a picture shows.
"""

"""The engine: regions' layout, sections and peers, connections. Knows no event loop and no clock (see
engine.py)."""

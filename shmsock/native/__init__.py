"""The C core (see LAYOUT.md for what lies in memory, core.h for what is called)."""

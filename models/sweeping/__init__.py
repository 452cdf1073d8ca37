"""The cells of a sweep, the bases that small forms need, and what all that would take."""

"""Tables from foreign checkpoints: what they call a parameter, and what it is here."""

"""Training of the router's parts on synthetic facts: projections, request gate, token characters."""

"""What a trial trains: adapters or unfrozen weights on the base, and the artifacts saved of them."""

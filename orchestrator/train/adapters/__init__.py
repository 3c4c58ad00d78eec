"""The trainable part of a trial: adapters or unfrozen weights on the base, and the artifacts that save them."""

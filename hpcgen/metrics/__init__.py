"""Numbers from one or two sets of crystals, as the field defines them."""

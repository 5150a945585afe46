"""What interatomic potentials say of crystals."""

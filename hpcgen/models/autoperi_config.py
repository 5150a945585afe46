"""Settings of AutoPeri. Imports no torch, so that a config can be checked on a login node."""

from dataclasses import dataclass, field

from hpcgen.errors import UsageError


@dataclass
class AutoPeriConfig:
    """The network, the noise and the weights of the losses."""

    width: int = 160
    layers: int = 6
    heads: int = 8
    pair_width: int = 48
    frequencies: int = 6  # of the angular Fourier features along each axis
    radial: int = 16  # radial functions of the minimum-image distance
    cutoff: float = 8.0  # Å, of the radial functions
    edges: str = "all"  # which atoms see each other; `store`: those the store's rule for edges joins
    max_atoms: int = 64  # larger crystals are refused in training
    lattice_sigma: tuple[float, float] = (0.01, 10.0)  # least and most noise on the standardised lattice
    schedule: float = 3.0  # its σ^(1/schedule) rises evenly with the time: 1 is linear, large is geometric
    known_species: float = 0.5  # share of training samples whose elements are given, as in `predict`
    lattice_weight: float = 0.2
    species_weight: float = 0.2
    conditions: list[str] = field(default_factory=list)  # columns of the store
    condition_dropout: float = 0.2  # share of samples for which a condition is left out
    chemical_system: float = 0.2  # share of samples with unknown species that are told their elements

    def checked(self) -> "AutoPeriConfig":
        """These settings, if each is in its range. Raises UsageError naming the one that is not."""
        for name in ("width", "layers", "heads", "pair_width", "frequencies", "max_atoms"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"autoperi.{name} = {getattr(self, name)}: want at least 1")
        if self.radial < 2 or not self.cutoff > 0:
            raise UsageError(f"autoperi.radial = {self.radial}, cutoff = {self.cutoff}: want at least 2 within some Å")
        if self.edges not in ("all", "store"):
            raise UsageError(f"autoperi.edges = {self.edges!r}: want all or store")
        if self.width % (2 * self.heads):
            raise UsageError(f"autoperi.width = {self.width}: want a multiple of twice heads = {self.heads}")
        least, most = self.lattice_sigma
        if not 0 < least < most:
            raise UsageError(f"autoperi.lattice_sigma = {least}, {most}: want 0 < least < most")
        if not self.schedule >= 1:
            raise UsageError(f"autoperi.schedule = {self.schedule}: want 1 or more")
        for name in ("known_species", "condition_dropout", "chemical_system"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"autoperi.{name} = {getattr(self, name)}: want a share between 0 and 1")
        for name in ("lattice_weight", "species_weight"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"autoperi.{name} = {getattr(self, name)}: want 0 or more")
        return self

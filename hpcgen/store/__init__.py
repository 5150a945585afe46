"""Crystals on disk: sharded HDF5 stores, their writer, reader and the shared path of every source."""

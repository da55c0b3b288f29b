"""Device functions that several types of blocks are read with."""

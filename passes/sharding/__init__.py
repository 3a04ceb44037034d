"""One graph in several that run one after another, so that weights need not be in memory all at once."""

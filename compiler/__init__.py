"""The compiler: from a checkpoint to a bundle, and everything that looks at bundles."""

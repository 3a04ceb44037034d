"""One graph cut in three, by how often each part has to run."""

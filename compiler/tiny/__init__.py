"""The project's own trained model: data, training and the judge that evaluation uses."""

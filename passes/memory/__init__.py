"""What a graph's activations take: lifetimes, an arena that they share, and an order of nodes that lowers the peak."""

"""How good a bundle's pictures are: metrics, the judge's statistics, and the reports made of them."""

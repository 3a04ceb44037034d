"""Kernels of our own for the CPU, in C++, built on the machine that runs them."""

"""The mathematics of a low-rank update. Each operation is one autograd function over interchangeable kernels."""

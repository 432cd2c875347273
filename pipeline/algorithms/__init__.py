"""One file an algorithm: pure tensor maths with its paper and formula."""

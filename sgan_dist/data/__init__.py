"""Prepared datasets: an index, two orders, streams over tars, and the semi-supervised loader."""

"""``spectral-compile bench``: what a compressed cache costs and saves in time, beside dense ones; one part a file."""

"""What a compressed cache costs in quality and saves in bytes, beside dense and rival caches."""

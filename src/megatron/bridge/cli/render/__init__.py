"""Results as rich tables that fit 100 columns."""

"""Text for people: lists that are folded, sizes, and untrusted text made safe to print."""

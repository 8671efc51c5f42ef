"""What the folders of both worlds consist of: which files, and which bytes at which offset."""

"""What trainers set up and change on a model before they train it."""

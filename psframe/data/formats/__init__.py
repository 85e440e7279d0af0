"""One module for each format that data comes in."""

"""Pure tensor functions that two methods or more share."""

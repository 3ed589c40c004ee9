"""The callbacks, one to a file; what they share is in `helpers`."""

"""The model itself: its layers, cutting them, its optimizer, its files."""

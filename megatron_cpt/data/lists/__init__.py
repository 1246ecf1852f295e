"""Data lists: their formats, and exact arithmetic of budgets over them."""

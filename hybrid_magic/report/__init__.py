"""How a run looks on paper: its table, its figure, its page. Reads records; knows no notebook."""

"""The notebook's side: magics, capture, the panel under the cell. Nothing imports this room."""

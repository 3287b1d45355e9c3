"""The whole table: every training cell of the corpus."""

import cells_blocks
import cells_classes
import cells_control
import cells_full_batch
import cells_functions
import cells_generative
import cells_loaders
import cells_logging
import cells_losses
import cells_rare
import cells_refused
import cells_schedules
import cells_sequences
import cells_shapes
import cells_steps
import cells_traps
import cells_tutorials

CELLS = [
    *cells_tutorials.CELLS,
    *cells_logging.CELLS,
    *cells_functions.CELLS,
    *cells_classes.CELLS,
    *cells_steps.CELLS,
    *cells_schedules.CELLS,
    *cells_losses.CELLS,
    *cells_generative.CELLS,
    *cells_sequences.CELLS,
    *cells_loaders.CELLS,
    *cells_shapes.CELLS,
    *cells_full_batch.CELLS,
    *cells_control.CELLS,
    *cells_blocks.CELLS,
    *cells_rare.CELLS,
    *cells_traps.CELLS,
    *cells_refused.CELLS,
]

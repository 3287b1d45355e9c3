"""Worker processes of one machine, started from a notebook: `--processes N`.

The notebook packs what is to be trained, starts the workers under torchrun's elastic agent, follows
them, and takes the trained weights back. How several processes train one model is the engine's.
"""

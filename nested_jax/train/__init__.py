"""The training program: config, step, loop, and the run folder that it writes. It imports nothing, so that help is quick."""

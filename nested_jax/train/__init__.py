"""The training program: a config, a step, a loop, and the run folder it leaves. Nothing is imported here: help is quick."""

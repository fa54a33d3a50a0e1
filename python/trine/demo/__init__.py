"""The main job on real input: a trained model in, a smaller and faster one out, checked and shown.

`job.run` is the whole of it; `python -m trine.demo.serve` is the process that models are served in.
"""

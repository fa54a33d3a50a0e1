"""What `python -m benchmarks.run gpu` times: the CUDA and Triton kernels on the GPU that is there.

It shares cases, rows of the result and tables with the CPU's benchmarks; its own are the timing by
graph replay, ceilings, peers, the order of work under a limit of time, and the goals.
"""

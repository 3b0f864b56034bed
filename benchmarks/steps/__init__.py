"""What the GPU suite's processes do: a module a step, whose `step(device, **options)` gives a function from the name of
an item to what was found, ready for JSON.

Whatever an item raises is its result, and costs the others nothing; see benchmarks/worker.py.
"""

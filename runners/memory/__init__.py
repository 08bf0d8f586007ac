"""What memory a run takes: its own step on tensors without memory, told before it begins, and what to lower
where it is too much.
"""

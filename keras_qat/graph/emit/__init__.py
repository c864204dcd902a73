"""How each operation is written: one small function per op, integers only.

Every function gets a `Call`: the Keras node, the names of its integer inputs, the tensor to write, the activation fused
behind it. What an op has to move around itself (a 1D convolution is a 2D one between two reshapes) it does here.
"""

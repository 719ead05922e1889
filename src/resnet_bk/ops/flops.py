"""FLOPs of the core's recurrences: what the operators tell torch's counter, and what the compute ledger books.

A multiply-add is two operations, as torch counts a matrix product; a division is one.
"""

GREEN = 3  # a site of the left Green's function: multiply, subtract, divide
GREEN_BACKWARD = 6
SCAN = 5  # an entry of the state at a site: decay 1, write 2, read 2
SCAN_BACKWARD = 14  # recompute 3, dq 2, then adjoint 3, dk 2, dv 2, dalpha 2
DELTA = 7  # as SCAN, and what the state returns for the key 2
DELTA_BACKWARD = 18  # as SCAN_BACKWARD, and the same for key and error 4
FILL = 3  # a value at a left-out site: fade 1, its own value 2
FILL_BACKWARD = 8

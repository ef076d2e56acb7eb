"""What holds for all tests."""

import os
import signal

# Tests that run beside each other have one math thread each: more would wait for each other, for
# longer than they compute.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Who starts the tests in the background may have Ctrl-C ignored, which children inherit; some tests
# interrupt themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

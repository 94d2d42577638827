"""A measurement that takes too long, and saves what it has when it is interrupted."""

import time

try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saved")
raise SystemExit(1)

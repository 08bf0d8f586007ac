import sys

from runners.fidelity.command import main

sys.exit(main())

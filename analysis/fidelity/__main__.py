import sys

from analysis.fidelity.command import main

sys.exit(main())

import sys

from analysis.compare.command import main

sys.exit(main())

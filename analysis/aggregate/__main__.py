import sys

from analysis.aggregate.command import main

sys.exit(main())

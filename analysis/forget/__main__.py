import sys

from analysis.forget.command import main

sys.exit(main())

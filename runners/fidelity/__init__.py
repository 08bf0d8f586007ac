"""Whether values mean something: experiments that hold them against what really happens."""

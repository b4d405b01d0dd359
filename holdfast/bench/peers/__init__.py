"""Other engines, run on the same work: in a process of their own, or in ours."""

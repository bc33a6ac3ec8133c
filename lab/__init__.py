"""How far a policy is from the truth: exact evaluation, long runs, tables and pictures."""

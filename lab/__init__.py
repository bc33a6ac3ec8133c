"""How far a policy is from the truth: exact evaluation, figures, and the claims of the paper."""

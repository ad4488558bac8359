class Problem(ValueError):
    """Something the user can mend; its message is one readable line naming the key, the value and the way out."""

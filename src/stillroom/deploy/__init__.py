"""A student in the forms that serve it: exported, checked against torch, measured, loaded again."""

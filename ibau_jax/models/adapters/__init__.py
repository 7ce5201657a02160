"""Models of other libraries as what every defense is given (`models.model.Model`).

Each adapter imports its library only when it is used.
"""

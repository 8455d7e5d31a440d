"""Imported once before the forks: what SymPy sets up at first use is then set up in every process."""

import sympy

_x, _y = sympy.symbols("x y")
sympy.expand((_x + 1) ** 3 - _y)
sympy.solve(_x**2 - 2, _x)
sympy.simplify((_x**2 - 1) / (_x - 1))
str(sympy.Rational(1, 3) + sympy.sqrt(2))

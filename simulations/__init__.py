"""Studies of fedsplit that anyone can rerun: ``python -m simulations`` lists them.

A study is a module or a folder here, but for ``shared``. It has

- a docstring, whose first line says what is asked, and a line ``Takes ...`` where it is known how long that takes;
- ``Options``, a dataclass of what can be chosen, each with its value for ``--quick``;
- ``study(options)``, which measures and returns what becomes ``simulations/results/NAME.json``;
- ``tables(results)``, which makes the documentation's tables of that file alone, in Markdown;
- where it draws, ``draw(results, path)``, which makes ``simulations/results/NAME.png`` of it.
"""

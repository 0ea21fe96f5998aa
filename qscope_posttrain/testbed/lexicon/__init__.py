"""Word lists and grammars of the testbed's languages, one module per language, each with `WORDS`, `RULES`, `JOINER`.

The notation is described in `qscope_posttrain.testbed.grammar`, which draws text from them.
"""

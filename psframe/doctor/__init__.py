"""Whether this machine, and this way of starting ranks, is fit for psframe.

Facts are gathered by `local`, `software`, `gpus`, `folder` and `ranks`, whatever may hang or crash
in processes that can be thrown away; `judging_*` judge them, and `checks` is the table of it all.
"""

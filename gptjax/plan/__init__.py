"""Planning without the hardware: does an experiment fit on these chips, how long will it take, what will it cost?"""

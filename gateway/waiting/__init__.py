"""Turns that wait while every engine is full: one bounded queue, fair between accounts over all workers.

`rounds` decides who is next, `queue` keeps the turns and hands them to engines, `sharing` tells the workers of each other.
"""

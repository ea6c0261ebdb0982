"""Memories' chunks as kernels of TPUs, by Pallas: their weights stay in the chip's fast memory from chunk to chunk.

`tiles`: arithmetic on matrices there. `recurrence`: one chunk of linear maps. `linear`, `deep`, `titans`, `self_modifying`:
one chunk of the memories. `form`: what a kernel reads of them. `scan`: a scan over chunks as one kernel, and its backward
kernel. `stream`: its derivatives of any order.
"""

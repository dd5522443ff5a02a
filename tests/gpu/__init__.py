"""Tests of a GPU. What of a container's packages is broken is hidden from Megatron-Core before any of them, here or in a rank, imports it."""

import opd_megatron

opd_megatron.import_megatron()

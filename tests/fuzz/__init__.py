"""Damaged and forged files through the real readers: each ends well or in an error of lightship."""

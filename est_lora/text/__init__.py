"""Text that others read: the infotext of a picture."""

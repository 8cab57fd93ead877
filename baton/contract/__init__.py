"""The contract between processes: messages, their encoding, request life, errors.

Standard library and msgspec only. Nothing here does I/O, reads a clock or imports a role.
"""

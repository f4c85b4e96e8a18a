"""A piece of shared memory as a buffer of its own, which tells when nobody looks at it any more."""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from libc.string cimport memcpy

__all__ = ["Span", "copy_into"]

# Giving the GIL up and taking it again can cost a thread's whole switch interval: only a long copy is worth it.
cdef Py_ssize_t LONG = 256 << 10  # bytes


@cython.final
@cython.no_gc
cdef class Span:
    """`size` bytes of `mapping` from `offset` on, writable; exports a contiguous buffer.

    Arrays made over it keep it alive, and it keeps the mapping. When the last of them has gone, `offset` is appended
    to `returned`. Raises ValueError for a piece that is not inside the mapping.
    """

    cdef Py_buffer _mapping
    cdef bint _held
    cdef list _returned
    cdef readonly Py_ssize_t offset
    cdef readonly Py_ssize_t size

    def __cinit__(self, mapping not None, Py_ssize_t offset, Py_ssize_t size, list returned=None, /):
        PyObject_GetBuffer(mapping, &self._mapping, PyBUF_WRITABLE)
        self._held = True
        if offset < 0 or size < 0 or offset > self._mapping.len - size:
            raise ValueError(f"{size} bytes from {offset} on are not inside a mapping of {self._mapping.len} bytes")
        self.offset, self.size = offset, size
        self._returned = returned

    def __dealloc__(self):
        if not self._held:
            return
        PyBuffer_Release(&self._mapping)
        if self._returned is not None:
            self._returned.append(self.offset)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, <char*>self._mapping.buf + self.offset, self.size, 0, flags)

    def __len__(self):
        return self.size


def copy_into(mapping not None, Py_ssize_t offset, data not None, /):
    """Copy the contiguous buffer `data` into `mapping` from `offset` on; a long copy lets other threads run.

    Raises ValueError when it does not fit, BufferError for a buffer that is not contiguous.
    """
    cdef Py_buffer into, source
    cdef Py_ssize_t size
    PyObject_GetBuffer(mapping, &into, PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(data, &source, 0)
        try:
            size = source.len
            if offset < 0 or offset > into.len - size:
                raise ValueError(f"{size} bytes from {offset} on are not inside a mapping of {into.len} bytes")
            if size < LONG:
                memcpy(<char*>into.buf + offset, source.buf, size)
            else:
                with nogil:
                    memcpy(<char*>into.buf + offset, source.buf, size)
        finally:
            PyBuffer_Release(&source)
    finally:
        PyBuffer_Release(&into)

"""Recall: which of one user's memories fit a question, in one call.

For a question with unique terms t and the memories i that may be seen, N of them in all, with i+k the k-th visible
one after i in the same session:

    idf(t)       ln(1 + (N - df + 0.5) / (df + 0.5)), df memories hold t
    m(t, i)      the best match of t among the terms of i: 1 for the same stem, else max(0, (cosine - 0.3) / 0.7) of
                 the two words' vectors, which are centred over the language
    fall(k)      1, 0.6, 0.4, 0.3 for |k| = 0, 1, 2, 3

    coverage(i)  sum of idf(t) max over k of fall(k) m(t, i+k),  divided by the sum of idf
    session(i)   BM25 (k1 1.2, b 0.5) of the whole session as one text, idf over sessions,  divided by the sum of idf
    cosine(i)    of the question's vector and the memory's, both less the mean of the user's memories; 0 where one of
                 them is not 0.1 away from it, and for a question whose vector is zero
    around(i)    sum over k != 0 of fall(k) cosine(i+k)
    reply(i)     the coverage of i-1 by its own terms, if it ends with a question mark
    date(i)      1 if the question names the month of i, 3 with its day as well
    speaker(i)   +1 if the question names one person, who said i; -1 if somebody else did
    question(i)  1 if i ends with a question mark: what asks tells nothing
    recency(i)   2 ^ -(age / half life), where a half life is given

    score(i)     the sum of these, each times its weight

The scheme is that of soft coverage over neighbouring turns. The weights are the mean of those that maximise the
likelihood of LoCoMo's evidence turns (softmax over a conversation's turns), each fitted on all of its conversations
but one: `benches/fit_recall.py`. recency's is the asker's.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport isfinite
from libc.stdint cimport int8_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from lexical cimport wf_postings
from recall cimport (
    WF_MOST_TERMS,
    WF_NO_SPEAKER,
    WF_PARTS,
    wf_answer,
    wf_answer_all,
    wf_ask,
    wf_find_kindred,
    wf_words,
)
from vector cimport (
    WF_ALIGNMENT,
    aligned_alloc,
    wf_hit,
    wf_path,
    wf_paths,
    wf_rows,
    wf_scan,
    wf_table_release,
)

from ._lexical import Postings
from ._vector import Rows

__all__ = ["PARTS", "WEIGHTS", "Question", "Words", "parts", "recall"]

PARTS = ("coverage", "session", "cosine", "around", "reply", "date", "speaker", "question", "recency")
WEIGHTS = (8.1, 10.3, 2.7, 1.2, 3.1, 3.7, 0.6, -1.0, 0.0)

cdef const wf_path *PATHS
cdef size_t PATH_COUNT = wf_paths(&PATHS)
cdef int KINDRED_KEPT = 8192  # words, about a kilobyte each
cdef int KINDRED_SOUGHT = 2   # words a question: each takes a look at all words, a third of a millisecond
cdef size_t HELD_ROWS = 1000  # asked of fewer rows in all, the GIL is kept: getting it back may take longer


cdef wf_scan scan_of(str path) except NULL:
    if path is None:
        return PATHS[0].scan
    for i in range(PATH_COUNT):
        if PATHS[i].name.decode() == path:
            return PATHS[i].scan
    raise ValueError(f"path is {path!r}; this machine does not run it")


@cython.final
cdef class Words:
    cdef wf_words table
    cdef dict kindred  # number -> the numbers of all words that match it, uint16
    cdef int32_t *products
    cdef uint16_t *list

    def __cinit__(self, const int8_t[:, ::1] rows not None, const float[::1] scale not None, /):
        cdef size_t d = rows.shape[1], i
        if rows.shape[0] != scale.shape[0] or not rows.shape[0] or not d:
            raise ValueError(f"{scale.shape[0]} scales do not fit rows of shape {(rows.shape[0], rows.shape[1])}")
        self.table.count = rows.shape[0]
        self.table.stride = (d + WF_ALIGNMENT - 1) & ~(<size_t>WF_ALIGNMENT - 1)
        self.table.rows = <int8_t *>aligned_alloc(WF_ALIGNMENT, self.table.count * self.table.stride)
        self.table.scale = <float *>malloc(self.table.count * sizeof(float))
        self.products = <int32_t *>malloc(self.table.count * sizeof(int32_t))
        self.list = <uint16_t *>malloc(self.table.count * sizeof(uint16_t))
        self.kindred = {}
        if self.table.rows == NULL or self.table.scale == NULL or self.products == NULL or self.list == NULL:
            raise MemoryError
        memset(self.table.rows, 0, self.table.count * self.table.stride)
        memcpy(self.table.scale, &scale[0], self.table.count * sizeof(float))
        for i in range(self.table.count):
            memcpy(self.table.rows + i * self.table.stride, &rows[i, 0], d)

    def __dealloc__(self):
        free(self.table.rows)
        free(self.table.scale)
        free(self.products)
        free(self.list)

    def __len__(self):
        return self.table.count

    cdef bytes kindred_to(self, size_t number):
        """Look through all words for those that match this one, and remember them."""
        cdef size_t found = wf_find_kindred(&self.table, number, PATHS[0].scan, self.products, self.list)
        cdef bytes kept = PyBytes_FromStringAndSize(<char *>self.list, <Py_ssize_t>(found * sizeof(uint16_t)))
        if len(self.kindred) >= KINDRED_KEPT:
            self.kindred.clear()
        self.kindred[number] = kept
        return kept


@cython.final
cdef class Question:
    cdef object rows, postings  # these keep alive what the pointers point to
    cdef Words words
    cdef bytes allowed, rows_asked
    cdef list kindred
    cdef int sought
    cdef wf_ask ask
    cdef float *vectors
    cdef float weights[9]

    def __cinit__(self, rows not None, postings not None, Words words not None, list terms not None,
                  list numbers not None, const float[::1] vector, Py_ssize_t k, bytes allowed not None, *,
                  double since=-float("inf"), double until=float("inf"), unsigned int months=0, unsigned int days=0,
                  Py_ssize_t speaker=-1, double now=0.0, double half_life=0.0, weights=None,
                  const unsigned int[::1] only=None, str path=None):
        if not isinstance(rows, Rows) or not isinstance(postings, Postings):
            raise TypeError(f"{type(rows).__name__} and {type(postings).__name__} are not Rows and Postings")
        cdef wf_rows *table = <wf_rows *>PyCapsule_GetPointer(rows.kernel, "whisper_fast.rows")
        if k < 0:
            raise ValueError(f"k is {k}; it must not be negative")
        if len(terms) != len(numbers):
            raise ValueError(f"{len(numbers)} words do not fit {len(terms)} terms")
        if not half_life >= 0:
            raise ValueError(f"half_life is {half_life}; it must be at least 0 seconds")
        if not isfinite(now):
            raise ValueError(f"now is {now}; it must be a time")
        self.rows, self.postings, self.words, self.allowed = rows, postings, words, allowed
        self.ask.postings = <wf_postings *>PyCapsule_GetPointer(postings.kernel, "whisper_fast.postings")
        self.ask.words = &words.table
        self.ask.allowed = <const uint8_t *>PyBytes_AS_STRING(allowed)
        self.ask.scopes = PyBytes_GET_SIZE(allowed)
        self.ask.since, self.ask.until = since, until
        self.ask.months, self.ask.days = months, days
        self.ask.speaker = WF_NO_SPEAKER if speaker < 0 else speaker
        self.ask.now, self.ask.half_life = now, half_life
        self.ask.scan = scan_of(path)
        self._take_weights(WEIGHTS if weights is None else tuple(weights))
        if only is not None:
            self.rows_asked = bytes(only)
            self.ask.only = <const uint32_t *>PyBytes_AS_STRING(self.rows_asked)
            self.ask.only_count = only.shape[0]
        self._take_terms(terms, numbers)
        self._take_rows(table, vector)
        self.ask.k = min(<size_t>k, self.ask.rows.count)

    def __len__(self):
        return self.ask.rows.count

    def __dealloc__(self):
        wf_table_release(self.ask.rows.table)
        free(self.vectors)

    cdef _take_weights(self, tuple given):
        if len(given) != WF_PARTS:
            raise ValueError(f"there are {len(given)} weights; there must be {WF_PARTS}")
        for i, weight in enumerate(given):
            self.weights[i] = weight
            if not isfinite(self.weights[i]):
                raise ValueError(f"the weight of {PARTS[i]} is {weight}; it must be a number")
        self.ask.weights = self.weights

    cdef _take_terms(self, list terms, list numbers):
        """Keep each term once, the first ones if there are too many."""
        seen = dict(zip(terms, numbers))
        for term, number in seen.items():
            if self.ask.terms == WF_MOST_TERMS:
                break
            self.ask.hashes[self.ask.terms] = <uint64_t><Py_hash_t>hash(term)
            self.ask.numbers[self.ask.terms] = number
            self.ask.terms += 1
        self._take_kindred()

    cdef _take_kindred(self):
        """Look up what the words are kindred to. Without it the answer is the same, and takes longer."""
        cdef size_t t, number
        cdef bytes found
        self.kindred = []
        for t in range(self.ask.terms):
            number = self.ask.numbers[t]
            if number >= self.words.table.count:
                continue
            found = self.words.kindred.get(number)
            if found is None and self.sought < KINDRED_SOUGHT:
                self.sought += 1
                found = self.words.kindred_to(number)
            if found is not None:
                self.kindred.append(found)
                self.ask.kindred[t].list = <const uint16_t *>PyBytes_AS_STRING(found)
                self.ask.kindred[t].count = PyBytes_GET_SIZE(found) // sizeof(uint16_t)

    cdef _take_rows(self, wf_rows *table, const float[::1] vector):
        """Hold the rows as they are now, and what is compared with them."""
        cdef size_t d = table.dimension, live = table.count - table.removed, j
        cdef bint directed = False
        self.ask.rows = table[0]
        self.ask.rows.count = min(table.count, <size_t>len(self.postings))  # else an append is under way
        if table.table != NULL:
            table.table.references += 1
        if vector is None or not live:
            return
        if vector.shape[0] != <Py_ssize_t>d:
            raise ValueError(f"the vector has {vector.shape[0]} dimensions; these rows have {d}")
        self.vectors = <float *>malloc(2 * d * sizeof(float))
        if self.vectors == NULL:
            raise MemoryError
        for j in range(d):
            if not isfinite(vector[j]):
                raise ValueError("the query holds a value that is not finite")
            directed = directed or vector[j] != 0
            self.vectors[j] = vector[j]
            self.vectors[d + j] = <float>(table.sum[j] / live)
        if directed:
            self.ask.vector, self.ask.mean = self.vectors, self.vectors + d


cdef list as_tuples(const wf_ask *ask):
    return [(ask.hits[i].row, ask.hits[i].score) for i in range(ask.found)]


def recall(list questions not None, /, *, Py_ssize_t threads=1):
    cdef size_t count = len(questions), rows = 0, room = 1, i
    cdef wf_hit *hits = NULL
    cdef wf_ask *asks = <wf_ask *>malloc((count + 1) * sizeof(wf_ask))
    questions = questions[:]  # what they point to lives as long as this
    try:
        if asks == NULL:
            raise MemoryError
        for i in range(count):
            asks[i] = (<Question?>questions[i]).ask
            rows += asks[i].rows.count
            room += asks[i].k
        hits = <wf_hit *>malloc(room * sizeof(wf_hit))
        if hits == NULL:
            raise MemoryError
        room = 0
        for i in range(count):
            asks[i].hits = hits + room
            room += asks[i].k
        if rows < HELD_ROWS:
            wf_answer_all(asks, count, 1)
        else:
            with nogil:
                wf_answer_all(asks, count, max(threads, 1))
        for i in range(count):
            if asks[i].found < 0:
                raise MemoryError
        return [as_tuples(&asks[i]) for i in range(count)]
    finally:
        free(hits)
        free(asks)


def parts(Question question not None, float[:, ::1] out not None, /):
    cdef wf_ask ask = question.ask
    if out.shape[0] != WF_PARTS or out.shape[1] != <Py_ssize_t>ask.rows.count:
        raise ValueError(f"out has shape {(out.shape[0], out.shape[1])}; it must have {(WF_PARTS, ask.rows.count)}")
    if not out.shape[1]:
        return
    out[:, :] = 0.0
    ask.k = 0
    ask.parts = &out[0, 0]
    wf_answer(&ask)
    if ask.found < 0:
        raise MemoryError

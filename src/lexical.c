#include "lexical.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint32_t *list_of(wf_term *term)
{
    return (uint32_t *)wf_list(term);
}

int wf_postings_open(wf_postings *index)
{
    memset(index, 0, sizeof *index);
    return pthread_rwlock_init(&index->lock, NULL) ? -1 : 0;
}

/* The term's slot, or the free one where it belongs. */
static uint32_t *find(const wf_postings *index, uint64_t hash)
{
    size_t i = (size_t)(hash ^ hash >> 32) & index->mask;
    while (index->slots[i] && index->terms[index->slots[i] - 1].hash != hash)
        i = (i + 1) & index->mask;
    return &index->slots[i];
}

static int reserve_slots(wf_postings *index, size_t terms)
{
    size_t old = index->slots ? index->mask + 1 : 0, size = old ? old : 32;
    while (terms * 3 > size * 2)
        size *= 2;
    if (size == old)
        return 0;
    uint32_t *slots = calloc(size, sizeof *slots);
    if (!slots)
        return -1;
    free(index->slots);
    index->slots = slots;
    index->mask = size - 1;
    for (size_t i = 0; i < index->used; i++)
        *find(index, index->terms[i].hash) = (uint32_t)i + 1;
    return 0;
}

int wf_postings_reserve(wf_postings *index, size_t terms)
{
    size_t needed = index->used + terms;
    if (needed > WF_MAX_TERMS || reserve_slots(index, needed))
        return -1;
    if (needed <= index->capacity)
        return 0;
    size_t capacity = needed + needed / 8;
    wf_term *list = realloc(index->terms, capacity * sizeof *list);
    if (!list)
        return -1;
    index->terms = list;
    index->capacity = capacity;
    return 0;
}

static int lengthen(wf_postings *index, wf_term *term)
{
    size_t old = (size_t)1 << term->log2, capacity = 2 * old;
    uint32_t *list = realloc(term->log2 > 1 ? term->list.far : NULL, capacity * sizeof *list);
    if (!list)
        return -1;
    if (term->log2 == 1)
        memcpy(list, term->list.here, 2 * sizeof *list);
    index->far_bytes += (capacity - (term->log2 > 1 ? old : 0)) * sizeof *list;
    term->list.far = list;
    term->log2++;
    return 0;
}

int wf_postings_add(wf_postings *index, uint64_t hash, uint16_t word)
{
    uint32_t *slot = find(index, hash), row = (uint32_t)index->rows, *last;
    if (!*slot) {
        index->terms[index->used++] = (wf_term){.hash = hash, .word = word, .log2 = 1};
        *slot = (uint32_t)index->used;
    }
    wf_term *term = &index->terms[*slot - 1];
    last = term->count ? list_of(term) + term->count - 1 : NULL;
    if (last && *last >> 8 == row) {
        *last += (*last & 255) < 255;
        return 0;
    }
    if (term->count == (uint32_t)1 << term->log2 && lengthen(index, term))
        return -1;
    list_of(term)[term->count++] = row << 8 | 1;
    return 0;
}

int wf_postings_end_row(wf_postings *index, uint32_t length)
{
    if (index->rows == index->row_capacity) {
        size_t capacity = index->rows + index->rows / 8 + 4;
        float *lengths = realloc(index->lengths, capacity * sizeof *lengths);
        if (!lengths)
            return -1;
        index->lengths = lengths;
        index->row_capacity = capacity;
    }
    index->lengths[index->rows++] = (float)length;
    index->total += length;
    index->live++;
    return 0;
}

static void take_out(wf_term *term, uint32_t row)
{
    uint32_t *list = list_of(term), low = 0, high = term->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (list[middle] >> 8 < row)
            low = middle + 1;
        else
            high = middle;
    }
    if (low < term->count && list[low] >> 8 == row)
        memmove(list + low, list + low + 1, (--term->count - low) * sizeof *list);
}

void wf_postings_remove(wf_postings *index, uint32_t row)
{
    for (size_t i = 0; i < index->used; i++)
        if (index->terms[i].count)
            take_out(&index->terms[i], row);
    if (row < index->rows && index->lengths[row] >= 0.0f) {
        index->total -= (uint64_t)index->lengths[row];
        index->live--;
        index->lengths[row] = -1.0f;
    }
}

const wf_term *wf_postings_find(const wf_postings *index, uint64_t hash)
{
    uint32_t slot = index->slots ? *find(index, hash) : 0;
    return slot && index->terms[slot - 1].count ? &index->terms[slot - 1] : NULL;
}

void wf_postings_score(const wf_postings *index, uint64_t hash, double k1, double b, float *out)
{
    const wf_term *term = wf_postings_find(index, hash);
    if (!term)
        return;
    const uint32_t *list = wf_list(term);
    double idf = log(1.0 + ((double)index->live - term->count + 0.5) / (term->count + 0.5));
    double floor = k1 * (1.0 - b), slope = k1 * b * (double)index->live / (double)index->total;
    for (uint32_t i = 0; i < term->count; i++) {
        uint32_t row = list[i] >> 8;
        double often = list[i] & 255;
        out[row] += (float)(idf * often / (often + floor + slope * index->lengths[row]));
    }
}

size_t wf_postings_bytes(const wf_postings *index)
{
    size_t slots = index->slots ? (index->mask + 1) * sizeof *index->slots : 0;
    size_t terms = index->capacity * sizeof *index->terms;
    return slots + terms + index->far_bytes + index->row_capacity * sizeof *index->lengths;
}

void wf_postings_free(wf_postings *index)
{
    for (size_t i = 0; i < index->used; i++)
        if (index->terms[i].log2 > 1)
            free(index->terms[i].list.far);
    free(index->terms);
    free(index->slots);
    free(index->lengths);
    pthread_rwlock_destroy(&index->lock);
}

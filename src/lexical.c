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
static wf_term *find(wf_term *slots, size_t mask, uint64_t hash)
{
    size_t i = (size_t)(hash ^ hash >> 32) & mask;
    while (slots[i].log2 && slots[i].hash != hash)
        i = (i + 1) & mask;
    return &slots[i];
}

int wf_postings_reserve(wf_postings *index, size_t terms)
{
    size_t old = index->slots ? index->mask + 1 : 0, size = old ? old : 64;
    while ((index->used + terms) * 3 > size * 2)
        size *= 2;
    if (size == old)
        return 0;
    wf_term *slots = calloc(size, sizeof *slots);
    if (!slots)
        return -1;
    for (size_t i = 0; i < old; i++)
        if (index->slots[i].log2)
            *find(slots, size - 1, index->slots[i].hash) = index->slots[i];
    free(index->slots);
    index->slots = slots;
    index->mask = size - 1;
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
    wf_term *term = find(index->slots, index->mask, hash);
    uint32_t row = (uint32_t)index->rows, *last;
    if (!term->log2) {
        *term = (wf_term){.hash = hash, .word = word, .log2 = 1};
        index->used++;
    }
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
        size_t capacity = index->rows + index->rows / 2 + 16;
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
    for (size_t i = 0; index->slots && i <= index->mask; i++)
        if (index->slots[i].count)
            take_out(&index->slots[i], row);
    if (row < index->rows && index->lengths[row] >= 0.0f) {
        index->total -= (uint64_t)index->lengths[row];
        index->live--;
        index->lengths[row] = -1.0f;
    }
}

const wf_term *wf_postings_find(const wf_postings *index, uint64_t hash)
{
    const wf_term *term = index->slots ? find(index->slots, index->mask, hash) : NULL;
    return term && term->count ? term : NULL;
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
    return slots + index->far_bytes + index->row_capacity * sizeof *index->lengths;
}

void wf_postings_free(wf_postings *index)
{
    for (size_t i = 0; index->slots && i <= index->mask; i++)
        if (index->slots[i].log2 > 1)
            free(index->slots[i].list.far);
    free(index->slots);
    free(index->lengths);
    pthread_rwlock_destroy(&index->lock);
}

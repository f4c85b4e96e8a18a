/* Words in common: coverage of a question by its neighbourhood, and by whole sessions. See pyx/_recall.pyx. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "recall_view.h"

#define NO_MATCH UINT32_MAX

/* A user's term that matches one of the question's. */
typedef struct {
    const wf_term *term;
    float match;
    uint32_t next;           /* of the same term of the question */
} wf_match;

typedef struct {
    wf_match *list;
    uint32_t count, capacity;
    uint32_t first[WF_MOST_TERMS];
    const wf_term *same[WF_MOST_TERMS]; /* the same stem, NULL for none */
} wf_matches;

static int keep(wf_matches *matches, const wf_term *term, size_t asked, float match)
{
    if (matches->count == matches->capacity) {
        uint32_t capacity = matches->capacity ? 2 * matches->capacity : 256;
        wf_match *list = realloc(matches->list, capacity * sizeof *list);
        if (!list)
            return -1;
        matches->list = list;
        matches->capacity = capacity;
    }
    matches->list[matches->count] = (wf_match){term, match, matches->first[asked]};
    matches->first[asked] = matches->count++;
    return 0;
}

/* How well a word fits another, from the product of their rows; not above 0: not at all. */
static float fit(const wf_words *words, size_t one, size_t other, int32_t product)
{
    float match = ((float)product * (words->scale[one] * words->scale[other]) - 0.3f) / 0.7f;
    return match < 1.0f ? match : 1.0f;
}

size_t wf_find_kindred(const wf_words *words, size_t number, wf_scan scan, int32_t *products, uint16_t *list)
{
    size_t found = 0;
    scan(words->rows, words->stride, words->rows + number * words->stride, words->count, products);
    for (size_t i = 0; i < words->count; i++)
        if (fit(words, i, number, products[i]) > 0.0f)
            list[found++] = (uint16_t)i;
    return found;
}

/* The words of the question: their rows, packed together, and marks of those that are worth a look. */
typedef struct {
    int8_t *rows;
    uint8_t *worth;          /* [words.count] */
    uint32_t term[WF_MOST_TERMS];
    size_t count;
} wf_asked;

static int take_words(const wf_ask *ask, wf_asked *asked)
{
    const wf_words *words = ask->words;
    *asked = (wf_asked){.rows = aligned_alloc(WF_ALIGNMENT, WF_MOST_TERMS * words->stride),
                        .worth = calloc(words->count, 1)};
    for (size_t t = 0; t < ask->terms && asked->rows && asked->worth; t++) {
        const wf_kindred *kindred = &ask->kindred[t];
        if (ask->numbers[t] >= words->count)
            continue;
        memcpy(asked->rows + asked->count * words->stride, words->rows + ask->numbers[t] * words->stride,
               words->stride);
        asked->term[asked->count++] = (uint32_t)t;
        for (size_t i = 0; i < kindred->count; i++)
            asked->worth[kindred->list[i]] = 1;
        if (!kindred->list)
            memset(asked->worth, 1, words->count);
    }
    return asked->rows && asked->worth ? 0 : -1;
}

static int match_kindred(const wf_ask *ask, const wf_asked *asked, const wf_term *term, wf_matches *matches)
{
    const wf_words *words = ask->words;
    int32_t products[WF_MOST_TERMS];
    ask->scan(asked->rows, words->stride, words->rows + term->word * words->stride, asked->count, products);
    for (size_t q = 0; q < asked->count; q++) {
        uint32_t t = asked->term[q];
        float match = fit(words, term->word, ask->numbers[t], products[q]);
        if (match > 0.0f && term->hash != ask->hashes[t] && keep(matches, term, t, match))
            return -1;
    }
    return 0;
}

/* What the user's terms have in common with those of the question: 1 for the same stem, less for a kindred word. */
static int find_matches(const wf_ask *ask, wf_matches *matches)
{
    const wf_postings *postings = ask->postings;
    wf_asked asked;
    int failed = take_words(ask, &asked);
    memset(matches->first, 0xff, sizeof matches->first);
    for (size_t t = 0; t < ask->terms && !failed; t++) {
        matches->same[t] = wf_postings_find(postings, ask->hashes[t]);
        failed = matches->same[t] && keep(matches, matches->same[t], t, 1.0f);
    }
    for (size_t i = 0; asked.count && i < postings->used && !failed; i++) {
        const wf_term *term = &postings->terms[i];
        if (term->word < ask->words->count && asked.worth[term->word] && term->count)
            failed = match_kindred(ask, &asked, term, matches);
    }
    free(asked.rows);
    free(asked.worth);
    return failed ? -1 : 0;
}

static double idf(double all, double held)
{
    return log(1.0 + (all - held + 0.5) / (held + 0.5));
}

/* ---- coverage ---- */

static void put_matches(wf_view *view, const wf_matches *matches, size_t asked)
{
    for (uint32_t m = matches->first[asked]; m != NO_MATCH; m = matches->list[m].next) {
        const wf_term *term = matches->list[m].term;
        const uint32_t *list = wf_list(term);
        float match = matches->list[m].match;
        for (uint32_t j = 0; j < term->count && list[j] >> 8 < view->rows; j++) {
            uint32_t place = view->place[list[j] >> 8];
            if (place == WF_NOWHERE)
                continue;
            view->touched[place / WF_BLOCK + 1] = 1;
            if (match > view->match[place])
                view->match[place] = match;
        }
    }
}

static inline float larger(float a, float b)
{
    return a > b ? a : b;
}

static void cover_block(float *restrict coverage, float *restrict own, const float *restrict match, float share)
{
    for (int i = 0; i < WF_BLOCK; i++) {
        float best = larger(match[i], WF_FALL[1] * larger(match[i - 1], match[i + 1]));
        best = larger(best, WF_FALL[2] * larger(match[i - 2], match[i + 2]));
        best = larger(best, WF_FALL[3] * larger(match[i - 3], match[i + 3]));
        coverage[i] += share * best;
        own[i] += share * match[i];
    }
}

static void cover(wf_view *view, const wf_matches *matches, size_t asked, float share)
{
    put_matches(view, matches, asked);
    for (size_t b = 0; b < view->blocks; b++) {
        size_t at = b * WF_BLOCK;
        if (view->touched[b] | view->touched[b + 1] | view->touched[b + 2])
            cover_block(view->coverage + at, view->own + at, view->match + at, share);
    }
    for (size_t b = 0; b < view->blocks; b++)
        if (view->touched[b + 1])
            memset(view->match + b * WF_BLOCK, 0, WF_BLOCK * sizeof *view->match);
    memset(view->touched, 0, view->blocks + 2);
}

/* ---- sessions ---- */

typedef struct {
    double *length, *often, *score; /* [sessions] terms, the term at hand, BM25 */
    uint32_t *holding;       /* those that hold the term at hand */
    size_t count;            /* of these */
    double held, all;        /* sessions that say anything, and their terms */
} wf_sessions;

static int open_sessions(wf_sessions *sessions, const wf_view *view)
{
    size_t n = view->sessions;
    double *at = calloc(n * (3 * sizeof *at + sizeof *sessions->holding) + 1, 1);
    *sessions = (wf_sessions){.length = at, .often = at + n, .score = at + 2 * n, .holding = (uint32_t *)(at + 3 * n)};
    if (!at)
        return -1;
    for (size_t s = 0; s < n; s++) {
        double length = 0.0;
        for (uint32_t place = view->start[s]; place < view->end[s]; place++)
            length += view->ask->postings->lengths[view->row[place]];
        sessions->length[s] = length;
        sessions->all += length;
        sessions->held += length > 0.0;
    }
    return 0;
}

static void hold(wf_sessions *sessions, uint32_t session, uint32_t often)
{
    if (sessions->often[session] == 0.0)
        sessions->holding[sessions->count++] = session;
    sessions->often[session] += often;
}

/* How often each session holds the term; returns how many of the rows that may be seen do. */
static uint32_t count_term(wf_sessions *sessions, const wf_view *view, const wf_term *term)
{
    const uint32_t *list = term ? wf_list(term) : NULL;
    uint32_t seen = 0, often = 0, session = 0; /* most neighbours in a list are of the same session */
    for (uint32_t j = 0; list && j < term->count && list[j] >> 8 < view->rows; j++) {
        uint32_t row = list[j] >> 8;
        if (view->place[row] == WF_NOWHERE)
            continue;
        if (often && view->session[row] != session) {
            hold(sessions, session, often);
            often = 0;
        }
        session = view->session[row];
        often += list[j] & 255;
        seen++;
    }
    if (often)
        hold(sessions, session, often);
    return seen;
}

static void score_term(wf_sessions *sessions)
{
    double rarity = idf(sessions->held, (double)sessions->count);
    for (size_t i = 0; i < sessions->count; i++) {
        uint32_t s = sessions->holding[i];
        double often = sessions->often[s], length = sessions->length[s] * sessions->held / sessions->all;
        sessions->score[s] += rarity * often / (often + 1.2 * (0.5 + 0.5 * length));
        sessions->often[s] = 0.0;
    }
    sessions->count = 0;
}

int wf_match_words(wf_view *view)
{
    const wf_ask *ask = view->ask;
    wf_matches matches = {0};
    wf_sessions sessions;
    double weight[WF_MOST_TERMS], total = 0.0;
    int failed = open_sessions(&sessions, view) || find_matches(ask, &matches);
    for (size_t t = 0; t < ask->terms && !failed; t++) {
        weight[t] = idf((double)view->seen, count_term(&sessions, view, matches.same[t]));
        total += weight[t];
        score_term(&sessions);
    }
    for (size_t t = 0; t < ask->terms && !failed; t++)
        if (matches.first[t] != NO_MATCH)
            cover(view, &matches, t, (float)(weight[t] / total));
    for (size_t s = 0; s < view->sessions && !failed; s++)
        for (uint32_t place = view->start[s]; place < view->end[s]; place++)
            view->session_fit[place] = (float)(sessions.score[s] / total);
    free(matches.list);
    free(sessions.length);
    return failed ? -1 : 0;
}
